"""Searches for the plan: candidates, their estimates, the choice, its reasons."""
