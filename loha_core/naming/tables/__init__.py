"""The families, by name; tests/core and tests/comfy hold the tables against diffusers' classes and ComfyUI's."""

from __future__ import annotations

from ..families import Family
from . import flux, mmdit, unified, video

FAMILIES: dict[str, Family] = {
    family.name: family for module in (flux, mmdit, video, unified) for family in module.FAMILIES
}
