"""Costs of layers, server and optimizer: measured, kept on disk, computed."""
