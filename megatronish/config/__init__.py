"""What a run is: frozen, strictly checked configuration models. Nothing here imports torch or deepspeed."""
