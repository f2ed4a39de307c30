"""The training loop of any objective: optimizers, EMA, checkpoints, FSDP, memory. Knows no stage
and no data."""
