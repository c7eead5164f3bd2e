"""Optimizer updates, pack by pack, and whether an optimizer allows that."""
