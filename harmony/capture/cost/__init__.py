"""Bytes and work of a layer, counted on tensors without memory."""
