"""What memory there is and how it is spent: room, pressure, budget, choice of model storage."""
