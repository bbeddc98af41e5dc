"""Replay a training step, and find the module that made NaN out of finite numbers."""
