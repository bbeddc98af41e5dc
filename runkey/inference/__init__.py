"""From image files to detections, exactly as `evaluate` computes them."""
