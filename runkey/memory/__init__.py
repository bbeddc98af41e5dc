"""How much memory a training step takes, and the micro-batch that fits.  Knows no training."""
