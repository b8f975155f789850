"""Documents to indexed data sets: inputs, encoding in worker processes, journal, and what is done with finished sets."""
