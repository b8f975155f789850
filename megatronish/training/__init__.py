"""Training: DeepSpeed's engine, the loop around it, its optimizers, checkpoints and what is watched."""
