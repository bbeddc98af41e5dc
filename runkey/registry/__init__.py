"""Runs by their keys: find, claim, reuse, compare, verify, reproduce, hand on.

Nothing here imports torch, mlflow or dvc but what moves files to and from a DVC remote: records are
small files beside the store, a server is asked over REST.
"""
