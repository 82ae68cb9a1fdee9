"""The maths: pure functions of tensors. Imports torch and nothing of this project."""
