"""Errors and timing of the operators and of other implementations. tools/bench/ops.py is its command line."""
