"""Observation of a run: metrics, MFU, loss spikes, black boxes, curves."""
