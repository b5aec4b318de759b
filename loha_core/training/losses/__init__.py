"""Losses that ask a model more than once: what the frozen base says, and what the adapter says at other strengths."""
