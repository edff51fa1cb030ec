"""Predict memory, communication, throughput and cost of a training run before launch."""
