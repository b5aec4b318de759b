"""What modules are called: prefixes and separators, Stable Diffusion's U-Nets, and a table for each family of DiTs."""
