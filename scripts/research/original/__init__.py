"""The original Harmony's estimator, decision space and search."""
