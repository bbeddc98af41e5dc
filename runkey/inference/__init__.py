"""From image files to detections, as `evaluate` makes them."""
