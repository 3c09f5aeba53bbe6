"""Computing a model: decoder, both attentions, rotary angles, dense products, threads."""
