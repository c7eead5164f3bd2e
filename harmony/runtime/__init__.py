"""Running: devices, host memory, and the executor of a Schedule."""
