"""Weights at rest: our checkpoints, Hugging Face folders and Meta's, read and written alike."""
