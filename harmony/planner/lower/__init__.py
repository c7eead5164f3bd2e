"""Lowers a task graph to a schedule, by small passes."""
