"""COCO metrics of a model or of saved predictions, and how well each image went."""
