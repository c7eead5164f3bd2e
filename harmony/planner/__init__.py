"""Planning: LayerGraph and costs to a verified Schedule. No torch, no clock, no thread."""
