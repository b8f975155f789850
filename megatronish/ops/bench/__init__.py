"""Timing of the operators beside other implementations, errors first. tools/bench_ops.py is its command line."""
