"""The demo: a LoHa teaches a small Stable Diffusion to write a digit it has never seen."""
