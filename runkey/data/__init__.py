"""COCO-format images in, batches of uint8 tensors out.  Knows nothing of models."""
