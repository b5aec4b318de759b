"""The weights of SD1.5, SDXL and Flux.1: every shape that a LoHa may be trained on, and how many layers have it.

Counted in ComfyUI's own modules built on the meta device: all weights of two or more dimensions, embeddings left out.
"""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]


def _shapes(text: str) -> dict[Shape, int]:
    """ "30*320x320" is thirty layers of (320, 320)."""
    entries = (word.split("*") for word in text.split())
    return {tuple(map(int, shape.split("x"))): int(count) for count, shape in entries}


_UNET = """
    1*320x4x3x3 1*4x320x3x3 8*320x320x3x3 1*640x320x3x3 2*320x640x3x3 1*320x960x3x3 8*640x640x3x3 1*640x960x3x3
    1*1280x640x3x3 1*640x1280x3x3 1*640x1920x3x3 1*1280x1920x3x3 1*640x320x1x1 2*320x640x1x1 1*320x960x1x1
    1*640x960x1x1 1*1280x640x1x1 1*640x1280x1x1 1*640x1920x1x1 1*1280x1920x1x1
"""
_SD15 = """
    30*320x320 10*320x768 1*1280x320 10*320x1280 30*640x640 10*640x768 5*2560x320 5*640x1280 12*1280x768 49*1280x1280
    5*640x2560 5*5120x640 6*1280x5120 6*10240x1280 10*320x320x1x1 10*640x640x1x1 12*1280x1280x1x1 5*1280x2560x1x1
    20*1280x1280x3x3 5*1280x2560x3x3
"""
_SDXL = """
    1*1280x320 5*320x1280 70*640x640 5*640x1280 20*640x2048 381*1280x1280 10*640x2560 120*1280x2048 10*5120x640
    1*1280x2816 60*1280x5120 60*10240x1280 2*1280x2560x1x1 11*1280x1280x3x3 2*1280x2560x3x3
"""
_FLUX = """
    1*3072x64 1*64x3072 2*3072x256 1*3072x768 41*3072x3072 1*3072x4096 1*6144x3072 76*9216x3072 38*12288x3072
    38*3072x12288 38*3072x15360 38*18432x3072 38*21504x3072
"""

MODELS: dict[str, dict[Shape, int]] = {
    "SD1.5": _shapes(_UNET + _SD15),
    "SDXL": _shapes(_UNET + _SDXL),
    "Flux": _shapes(_FLUX),
    "CLIP-L": _shapes("48*768x768 12*3072x768 12*768x3072"),
    "CLIP-G": _shapes("128*1280x1280 32*5120x1280 32*1280x5120"),
}


def distinct() -> dict[Shape, list[str]]:
    """Every shape once, smallest first, with the models that have it."""
    models: dict[Shape, list[str]] = {}
    for model, shapes in MODELS.items():
        for shape in shapes:
            models.setdefault(shape, []).append(model)
    return dict(sorted(models.items(), key=lambda item: (prod(item[0]), item[0])))
