"""Executes a schedule: one thread a device, one for updates."""
