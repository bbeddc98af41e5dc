"""The detector: backbone, Transformer, matching, losses, boxes out, weights in and out."""
