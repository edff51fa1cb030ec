"""What the programs share: the gate for configurations, checks before a launch, header, summary."""
