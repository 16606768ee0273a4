"""What survives a run, and what holds several processes together."""
