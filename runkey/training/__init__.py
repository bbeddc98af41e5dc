"""Training: device, precision, seeds, optimizer, schedule, the step, and the loop around it.

`runkey.training.build.build_training` composes a training from its parameters, and
`runkey.training.loop.fit` runs it.
"""
