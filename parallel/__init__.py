"""Parallelism: device mesh, launch, transforms of the model per axis, communication volume."""
