"""Speed against the peers, part by part: `make bench`, or `python -m benchmarks.speed`."""
