"""Training: state, step, loop, optimizers, checkpoints, metrics, sharding, preflight."""
