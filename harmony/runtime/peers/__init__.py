"""Several processes that train one model: what they send each other, and in which order."""
