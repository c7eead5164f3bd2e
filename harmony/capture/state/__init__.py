"""Random and Python state that a forward reads and changes."""
