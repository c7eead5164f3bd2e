"""State of a step that the recompute has to find as the forward found it."""
