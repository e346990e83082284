"""Whole models as pure functions, and reading their checkpoints."""
