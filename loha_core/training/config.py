"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import check_choice, check_number

# Accelerate's names -> the dtype of autocast.
MIXED_PRECISION = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingConfig:
    """Length of a run, batches per step, limits, and how often it is saved.

    Attributes:
        steps: optimizer steps.
        gradient_accumulation_steps: batches per optimizer step.
        seed: of everything random.
        mixed_precision: "no", or "fp16" or "bf16" for autocast around the loss; factors stay float32.
        max_grad_norm: gradients are clipped to this norm; 0 is off.
        ema_decay: decay of the exponential moving average that is saved and shown instead of the factors; 0 is off.
        max_norm: upper limit of each layer's ‖ΔW‖; 0 is off.
        save_every, preview_every: in steps; 0 is never (the state is saved at the end in any case).
        validate_every: in steps, where there is data to validate with.

    Raises:
        LoHaError: a value out of its range.
    """

    steps: int = 1000
    gradient_accumulation_steps: int = 1
    seed: int = 0
    mixed_precision: str = "no"
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    max_norm: float = 0.0
    save_every: int = 100
    preview_every: int = 0
    validate_every: int = 100

    def __post_init__(self) -> None:
        for name, minimum in (
            ("steps", 1),
            ("gradient_accumulation_steps", 1),
            ("save_every", 0),
            ("preview_every", 0),
            ("validate_every", 1),
        ):
            check_number(name, getattr(self, name), minimum=minimum, integer=True)
        for name in ("max_grad_norm", "max_norm"):
            check_number(name, getattr(self, name), minimum=0)
        check_number("ema_decay", self.ema_decay, minimum=0, below=1)
        check_choice("mixed_precision", self.mixed_precision, MIXED_PRECISION)
