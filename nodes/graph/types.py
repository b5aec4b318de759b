"""The types of connections that only this pack has, and the stack that other packs exchange."""

from __future__ import annotations

from comfy_api.latest import io

LOHA = io.Custom("LOHA")
LOHA_BLOCKS = io.Custom("LOHA_BLOCKS")
LOHA_CONFIG = io.Custom("LOHA_CONFIG")
LOHA_DATASET = io.Custom("LOHA_DATASET")
LOHA_GRID = io.Custom("LOHA_GRID")
LOHA_OBJECTIVE = io.Custom("LOHA_OBJECTIVE")
LOHA_OPTIMIZER = io.Custom("LOHA_OPTIMIZER")
LOHA_REGION = io.Custom("LOHA_REGION")
LOHA_SCHEDULE = io.Custom("LOHA_SCHEDULE")
LORA_STACK = io.Custom("LORA_STACK")
