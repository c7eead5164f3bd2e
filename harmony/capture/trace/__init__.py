"""Traces one forward of a module as a flat list of steps."""
