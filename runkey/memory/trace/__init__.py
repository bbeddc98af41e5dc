"""A training step on fake tensors, written down allocation by allocation.  Knows no training."""
