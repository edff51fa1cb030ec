"""Launch, exit codes, run folder, lock, event log, signals, watchdog, loss monitor and goodput."""
