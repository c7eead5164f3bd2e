"""Systems that Harmony is compared with; used by scripts and tests, not installed."""
