"""How a model is spread over processes: mesh, strategy, plan. Knows torch, Fabric and `model`."""
