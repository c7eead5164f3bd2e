"""Models built without memory, and weights read from files."""
