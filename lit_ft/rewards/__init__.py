"""What scores completions: published judges, Python functions, and weighted sums of them."""
