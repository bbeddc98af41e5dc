"""Record a training step on fake tensors, allocation by allocation."""
