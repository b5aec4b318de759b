"""Whole checkpoints."""
