"""Several processes as one job: start, roll call, agreement, and the watch over stuck processes."""
