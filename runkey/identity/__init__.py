"""The identity of a run: its key, the four parts of the key, and what is recorded of a run.

Imports neither torch nor mlflow nor dvc, so that a key is known in a fraction of a second.
"""
