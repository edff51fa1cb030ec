"""Command line, help, configuration loading and user-facing errors."""
