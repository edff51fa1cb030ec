"""What a run does besides forward and backward: optimizer, checkpoints, figures, ledger."""
