"""The command line: `harmony-run` and `harmony-run plan`."""
