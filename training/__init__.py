"""Root configuration, run state, optimizer, schedule, preflight checks, metrics and console."""
