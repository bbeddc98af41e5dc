"""Training: device, precision, seeds, optimizer, schedule, the step, and the loop around it.

`runkey.training.loop.fit` is the way in.
"""
