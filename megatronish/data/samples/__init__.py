"""Documents to samples: packing, bucketing, blending, splits, and the order in which training reads them."""
