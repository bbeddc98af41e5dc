"""Two keys compared part by part, and two runs."""
