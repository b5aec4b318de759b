"""Handwritten digits on many clients, as a Flower app."""
