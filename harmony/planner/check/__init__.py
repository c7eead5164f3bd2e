"""Checks a schedule without sharing code with the passes that make it."""
