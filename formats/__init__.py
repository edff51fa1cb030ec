"""Weights and tokenizers in native, Hugging Face and Meta formats: reading, writing, conversion."""
