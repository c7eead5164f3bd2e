"""What a run did: records of models, metrics, and the views of them."""
