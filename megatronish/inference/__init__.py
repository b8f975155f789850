"""Inference: sampling, generation with a key/value cache, evaluation on held-out text."""
