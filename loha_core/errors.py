"""The one exception of this project."""

from __future__ import annotations


class LoHaError(ValueError):
    """Something a user can act on: names the file and key, what was found and expected, and what to do."""
