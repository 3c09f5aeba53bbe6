"""What tensors become in memory: formats, packing, conversion."""
