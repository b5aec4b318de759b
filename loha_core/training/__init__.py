"""Training: the loop, what it is fed with, objectives, optimizers, checkpoints."""
