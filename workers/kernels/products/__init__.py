"""Matrix products, one file for each layout of weights, and the table of them."""
