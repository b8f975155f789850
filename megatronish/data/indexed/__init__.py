"""Megatron's indexed datasets: the format, the builder, and the manifest that ties one to its tokenizer."""
