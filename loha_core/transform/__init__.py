"""Adapters -> adapter: merge, resize, convert."""
