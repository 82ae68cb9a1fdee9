"""Models: where they come from, how they are loaded, adapted and made to score packed batches."""
