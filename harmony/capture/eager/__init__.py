"""Forwards that run on the device as they are, with parameters lent to them."""
