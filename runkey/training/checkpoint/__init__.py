"""Checkpoints: everything that a training needs to go on as if it had not been interrupted.

Taken at the boundary of an optimizer step.  Nothing about random numbers, loader or schedule is in
them: all of that is a function of seed, epoch and step.
"""
