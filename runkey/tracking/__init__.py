"""Record a training run: in a JSONL log always, in MLflow when it can be reached.

Importing its modules does not import mlflow, which takes 5 s; a thread does that during training.
"""
