"""Writes docs/formats.md: how adapters' files are laid out, and each family's names, from `loha_core.naming`.

PYTHONPATH=. python docs/formats.py
"""

from __future__ import annotations

from pathlib import Path

from loha_core.naming.families import Family, Span
from loha_core.naming.tables import FAMILIES

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Files and names

Written by `python docs/formats.py` from the tables in `loha_core/naming`; a test holds the two together.

## Prefixes

The same module, `transformer_blocks.0.attn.to_q` of Flux, as trainers spell it. All are read for every family.

| written by | name |
|---|---|
| kohya's scripts, musubi-tuner, ai-toolkit | `lora_unet_` + the original's name with `_` for `.` |
| LyCORIS around a diffusers model | `lora_unet_` or `lycoris_` + diffusers' name with `_` for `.` |
| SimpleTuner | `lycoris_…` as above, or `transformer.` + diffusers' name |
| OneTrainer | `lora_transformer_` + diffusers' name with `_` for `.`; convolutions' factors have four axes |
| diffusers, DiffSynth | `transformer.` or `unet.` + diffusers' name, or the name alone |
| ComfyUI, diffusion-pipe | `diffusion_model.` + the original's name |
| PEFT | a folder: `base_model.model.` + the model's own name, and `adapter_config.json` |

Behind the module stand `.hada_w1_a`, `.hada_w1_b`, `.hada_w2_a`, `.hada_w2_b`, with Tucker `.hada_t1`, `.hada_t2`;
`.alpha` and `.dora_scale`. Where no alpha tensor is there, alpha comes from `adapter_config.json`, from diffusers'
`lora_adapter_metadata`, or from kohya's `ss_network_alpha`; else alpha = rank is taken, and a note says so.

Rows: diffusers has several weights where the original has one; i and o are the columns and the rows of the original's
weight. *swapped*: the halves (scale and shift) are in the other order, where o = 2i.
"""


def page() -> str:
    return "\n".join([HEAD, *(section(family) for family in FAMILIES.values())])


def section(family: Family) -> str:
    lines = [f"## {family.name}", ""]
    lines.append(f"diffusers: `{family.diffusers}`." if family.diffusers else "diffusers has no class for it.")
    if family.sizes:
        labels = [label for label, _ in family.blocks]
        models = (
            f"{size.name} ({', '.join(f'{n} {label}' for n, label in zip(size.blocks, labels, strict=True))}"
            + (f", width {size.width})" if size.width else ")")
            for size in family.sizes
        )
        lines.append(f"Models: {'; '.join(models)}.")
    if family.blocks:
        lists = ", ".join(f"{label} is `{modules}`" for label, modules in family.blocks)
        lines.append(f"Blocks, in running order: {lists}.")
    lines += ["", "| diffusers | original | rows |", "|---|---|---|"]
    lines += [f"| `{row.diffusers}` | `{row.native}` | {shown(row.span)} |" for row in family.rows]
    if family.other_rows:
        lines += ["", "Also read:", "", "| name | original | rows |", "|---|---|---|"]
        lines += [f"| `{row.diffusers}` | `{row.native}` | {shown(row.span)} |" for row in family.other_rows]
    return "\n".join([*lines, ""])


def shown(span: Span | None) -> str:
    return "" if span is None else str(span)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
