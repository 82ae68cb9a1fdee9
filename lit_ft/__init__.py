"""Fine-tune language models with Lightning and Hydra; publish adapters that one vLLM serves."""

__version__ = "0.1.0"
