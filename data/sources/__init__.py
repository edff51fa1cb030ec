"""What documents come from: files and datasets, cut into parts, and their rows, each judged."""
