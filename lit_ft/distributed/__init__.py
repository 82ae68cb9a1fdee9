"""Several processes: started, joined, what they agree on, and how they share a model."""
