"""Replays one step of a training and finds where its numbers stop being finite."""
