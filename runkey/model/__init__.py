"""The detector: backbone, transformer, matching, losses, postprocessing, and weights files."""
