"""What this machine and this installation are like, and what to do about it."""
