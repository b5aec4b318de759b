"""Many clients, one model: what a server does with their updates (`aggregate`), and Flower (`flower`, an extra)."""

from .aggregate import aggregate

__all__ = ["aggregate"]
