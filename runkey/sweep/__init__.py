"""Sweeps: many trainings that differ in parameters, each made once in the whole team."""
