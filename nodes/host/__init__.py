"""All that knows how ComfyUI and other packs keep a layer's weight, and how to act on it."""
