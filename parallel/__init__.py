"""Device mesh, Fabric strategy, transforms of the model per axis, communication volume."""
