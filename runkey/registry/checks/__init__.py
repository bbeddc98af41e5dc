"""Whether a run is whole, and whether it can be had again."""
