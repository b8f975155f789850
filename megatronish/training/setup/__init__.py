"""From a configuration to a run that can start: checks, the checkpoint to resume from, the model, the summary."""
