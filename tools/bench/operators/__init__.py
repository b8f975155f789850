"""Timing of the operators beside other implementations, errors first. tools/bench/ops.py is its command line."""
