"""The model card that lies beside a saved adapter, as PEFT writes one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...formats.container import atomic

NAME = "README.md"

_CARD = """\
---
library_name: peft
{base}tags:
- loha
---

# {title}

A LoHa adapter (low-rank Hadamard product), in PEFT's format{on}.

```python
from peft import PeftModel  # or: from loha_core import LoHaModel

model = PeftModel.from_pretrained(base_model, "{title}")
```

Also `loha_core.load_adapter("{title}")`, and ComfyUI with ComfyUI-LoHa.
"""


def write(folder: Path, base_name: str | None) -> None:
    """Write the card, unless there is one: somebody may have filled it in."""
    if (folder / NAME).exists():
        return
    title = folder.resolve().name
    base = "" if not base_name else f"base_model: {json.dumps(base_name)}\n"
    text = _CARD.format(title=title, base=base, on=f" for `{base_name}`" if base_name else "")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / NAME) as temporary:
        temporary.write_text(text, "utf-8")


def base_name(config: Any) -> str | None:
    """What a model's own configuration (transformers', diffusers') says that it was loaded from; None without one."""
    if isinstance(config, Mapping):
        return config.get("_name_or_path")
    return getattr(config, "_name_or_path", None)
