"""Runs the recorded steps of a layer again."""
