"""Compares a step of Harmony with one of plain PyTorch."""
