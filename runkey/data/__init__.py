"""COCO data: checks, split, cache, augmentation, and the loaders."""
