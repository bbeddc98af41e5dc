"""What makes a run the same run: its key, and the four parts that the key is made of.

Imports neither torch nor mlflow nor dvc, so that a key is known in a fraction of a second.
"""
