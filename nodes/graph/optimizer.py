"""How a LoHa is trained: the optimizer, and what counts as an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from comfy_api.latest import io

from loha_core.training.objectives import Distance, Objective, Timesteps
from loha_core.training.optimizers import SOURCES, Curve, OptimizerConfig

from .inputs import json_object

LOHA_OPTIMIZER = io.Custom("LOHA_OPTIMIZER")
LOHA_OBJECTIVE = io.Custom("LOHA_OBJECTIVE")


@dataclass(frozen=True)
class Optimizing:
    """What LoHaOptimizer says: the optimizer, and `TrainingConfig`'s fields of these names."""

    optimizer: OptimizerConfig
    max_grad_norm: float = 1.0
    ema: float = 0.0
    max_norm: float = 0.0


def _number(name: str, default: float, tooltip: str, most: float = 1e6, *, optional: bool = True) -> Any:
    return io.Float.Input(
        name, default=default, min=0.0, max=most, step=0.000001, round=False, tooltip=tooltip, optional=optional
    )


class LoHaOptimizer(io.ComfyNode):
    """Name, learning rates, schedule -> LOHA_OPTIMIZER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoHaOptimizer",
            display_name="LoHa Optimizer",
            category="LoHa/train",
            description="How fast and by which method the LoHa is trained.",
            inputs=[
                io.Combo.Input(
                    "name",
                    options=list(SOURCES),
                    default="adamw",
                    tooltip="adamw and adafactor come with torch. The others need a library; the error says which.",
                ),
                _number("learning_rate", 1e-3, "Learning rate. Prodigy finds its own: give it 1.", optional=False),
                _number("text_learning_rate", 0.0, "Learning rate of the text encoders; 0: the same as the model's."),
                _number("weight_decay", 0.0, "Pulls the factors towards zero."),
                io.Combo.Input(
                    "schedule",
                    options=list(get_args(Curve)),
                    default="cosine",
                    optional=True,
                    tooltip="Learning rate over the run: constant, or falling in a line, a cosine, or several cosines.",
                ),
                io.Int.Input(
                    "warmup", default=0, min=0, max=100000, optional=True, tooltip="Steps over which the rate rises."
                ),
                io.Int.Input(
                    "cycles", default=1, min=1, max=1000, optional=True, tooltip="How many cosines 'restarts' has."
                ),
                _number("end_factor", 0.0, "What the learning rate falls to, as a share of it.", 1.0),
                _number("lora_plus", 1.0, "LoRA+: the factor that begins at zero learns this much faster.", 1000.0),
                _number("max_grad_norm", 1.0, "Gradients are scaled down to this norm; 0 is off."),
                _number(
                    "ema", 0.0, "Decay of the moving average that is saved instead, such as 0.99; 0 is off.", 0.99999
                ),
                _number("max_norm", 0.0, "No layer's update gets a larger Frobenius norm than this; 0 is off."),
                io.String.Input(
                    "options",
                    default="",
                    optional=True,
                    placeholder='{"betas": [0.9, 0.99]}',
                    tooltip="Further arguments of the optimizer's own, as JSON.",
                ),
            ],
            outputs=[LOHA_OPTIMIZER.Output(display_name="optimizer", tooltip="For Train LoHa.")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(optimizing(**values))


def optimizing(
    name: str = "adamw",
    learning_rate: float = 1e-3,
    text_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    schedule: Any = "cosine",
    warmup: int = 0,
    cycles: int = 1,
    end_factor: float = 0.0,
    lora_plus: float = 1.0,
    max_grad_norm: float = 1.0,
    ema: float = 0.0,
    max_norm: float = 0.0,
    options: str = "",
) -> Optimizing:
    """Checked values from the node's inputs."""
    more = json_object("options", options, '{"betas": [0.9, 0.99]}')
    config = OptimizerConfig(
        name, learning_rate, text_learning_rate or None, weight_decay, lora_plus, schedule, warmup, cycles, end_factor,
        {key: tuple(value) if isinstance(value, list) else value for key, value in more.items()},
    )  # fmt: skip
    return Optimizing(config, max_grad_norm, ema, max_norm)


class LoHaObjective(io.ComfyNode):
    """Which noise, and how errors count -> LOHA_OBJECTIVE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoHaObjective",
            display_name="LoHa Objective",
            category="LoHa/train",
            description="Which noise levels are trained, and how an error counts. What the model predicts is its own.",
            inputs=[
                io.Combo.Input(
                    "timesteps",
                    options=list(get_args(Timesteps)),
                    default="uniform",
                    tooltip="uniform: all alike. logit-normal: mostly the middle, as for SD3. shifted: more noise.",
                ),
                io.Float.Input("logit_mean", default=0.0, min=-10.0, max=10.0, step=0.01, tooltip="Of logit-normal."),
                _number("logit_std", 1.0, "Of logit-normal.", 10.0, optional=False),
                _number("shift", 3.0, "Of shifted: above 1 moves towards noise.", 100.0, optional=False),
                io.Combo.Input(
                    "distance",
                    options=list(get_args(Distance)),
                    default="mse",
                    tooltip="mse: squared error. huber: squared for small errors, linear for large ones. l1: linear.",
                ),
                _number("huber_delta", 0.1, "Where huber turns linear.", 100.0, optional=False),
                _number("min_snr_gamma", 0.0, "Limits the weight of nearly clean pictures; 5 is usual, 0 is off.",
                        1000.0, optional=False),
                io.Boolean.Input(
                    "debiased", default=False, tooltip="Weigh errors by 1/√SNR (debiased estimation); without min-SNR."
                ),
                _number("noise_offset", 0.0, "Noise that is one number per channel: lets pictures get darker or "
                        "brighter. 0.03 to 0.1.", 1.0, optional=False),
            ],
            outputs=[LOHA_OBJECTIVE.Output(display_name="objective", tooltip="For Train LoHa.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(Objective(**values))
