"""A running training on a terminal, read from its log."""
