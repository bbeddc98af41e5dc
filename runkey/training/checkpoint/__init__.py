"""Checkpoints: everything a training needs to resume exactly.

They are taken at the boundary of an optimizer step. Nothing about random numbers, loader or
schedule is in them: all of that is a function of seed, epoch and step.
"""
