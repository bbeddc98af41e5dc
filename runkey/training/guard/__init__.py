"""What happens when numbers go wrong: skipped steps counted, training taken back, spikes told."""
