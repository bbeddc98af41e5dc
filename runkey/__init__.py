"""runkey: train a detector on COCO-format images, and find every run again by its key."""

__version__ = "0.1.0"
