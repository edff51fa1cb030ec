"""What a run does besides forward and backward: optimizer, schedule, checkpoints, figures, ledger."""
