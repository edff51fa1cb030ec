"""Text sources: files and datasets divided into parts, and their rows."""
