"""Guards: what a forward's Python read from outside, and whether it still holds."""
