"""What each stage of dvc.yaml does."""
