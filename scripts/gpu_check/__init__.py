"""What `scripts/gpu-check` runs: steps, each a process of its own, and the page they fill."""
