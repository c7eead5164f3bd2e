"""Data and helpers that every room may import: no torch, no planner."""
