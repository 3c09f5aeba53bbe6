"""What sets each model family apart, one short file each."""
