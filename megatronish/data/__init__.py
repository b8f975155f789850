"""Text to tokens on disk to batches: Megatron-format data sets, tokenizers, packing, sampling and loading."""
