"""Measuring what a quality budget costs: calibration, perplexity."""
