"""What is observed of a run: metrics, MFU, loss spikes, incidents and their black boxes, curves."""
