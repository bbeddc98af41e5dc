"""One page about a run, or about what differs between several: a single HTML file."""
