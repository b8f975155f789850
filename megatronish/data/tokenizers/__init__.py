"""Tokenizers: their files, their libraries and the back ends that encode with them."""
