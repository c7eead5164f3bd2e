"""The step as plain PyTorch runs it, which Harmony's is compared with."""
