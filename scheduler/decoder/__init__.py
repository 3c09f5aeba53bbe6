"""Computing a model: decoder, kinds of attention, rotary angles, dense products, threads."""
