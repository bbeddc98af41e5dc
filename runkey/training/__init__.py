"""Training: `build.build_training` composes one from its parameters, and `loop.fit` runs it."""
