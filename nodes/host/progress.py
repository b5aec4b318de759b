"""ComfyUI's progress bar."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils


class ProgressBar(comfy.utils.ProgressBar):
    """Also where Cancel acts. ComfyUI's own does so when it tells the page, which 0.33 does not at every step."""

    def update_absolute(self, value: int, total: int | None = None, preview: Any = None) -> None:
        super().update_absolute(value, total, preview)
        comfy.model_management.throw_exception_if_processing_interrupted()
