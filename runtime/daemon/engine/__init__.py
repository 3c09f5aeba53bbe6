"""The daemon's side of the engine: which processes it needs, when they are replaced, what is said to them."""
