"""Serve published adapters: one vLLM, one chat page."""
