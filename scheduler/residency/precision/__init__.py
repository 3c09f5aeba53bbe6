"""Which expert is held in how many bits."""
