"""Evaluation of trained weights: held-out loss, benchmarks through lm-eval, text generation."""
