"""The nodes that set a training run's optimizer and its objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from comfy_api.latest import io

from loha_core.training.losses.timesteps import Timesteps
from loha_core.training.objectives import LossType, Objective
from loha_core.training.optimizers import SOURCES, Curve, OptimizerConfig

from .inputs import json_object, number, one_of, problems, schema, switch
from .types import LOHA_OBJECTIVE, LOHA_OPTIMIZER


@dataclass(frozen=True)
class OptimizerSettings:
    """An optimizer, and those fields of `TrainingConfig` that belong to it: norms and the decay of the average."""

    optimizer: OptimizerConfig
    training: Mapping[str, float]


_number = partial(number, step=0.000001, round=False)
_optional = partial(_number, optional=True)


class LoHaOptimizer(io.ComfyNode):
    """Name, learning rates, schedule -> LOHA_OPTIMIZER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaOptimizer",
            display_name="LoHa Optimizer",
            search_aliases=["learning rate", "adamw", "prodigy"],
            category="LoHa/train",
            description="How fast and by which method the LoHa is trained.",
            inputs=[
                one_of("name", SOURCES,
                       "adamw and adafactor come with torch. The others need a library; the error says which."),
                _number("learning_rate", 1e-3, "Learning rate. Prodigy finds its own: give it 1."),
                _optional("text_learning_rate", 0.0, "Learning rate of the text encoders; 0: the same as the model's."),
                _optional("weight_decay", 0.0, "Pulls the factors towards zero."),
                one_of("schedule", get_args(Curve),
                       "Learning rate over the run: constant, or falling in a line, a cosine, or several cosines.",
                       default="cosine", optional=True),
                number("warmup_steps", 0, "Steps over which the rate rises.", 0, 100_000, optional=True),
                number("cycles", 1, "How many cosines 'restarts' has.", 1, 1000, optional=True),
                _optional("end_factor", 0.0, "What the learning rate falls to, as a share of it.", 0, 1),
                _optional("lora_plus", 1.0, "LoRA+: the factor that begins at zero learns this much faster.", 0, 1000),
                _optional("max_grad_norm", 1.0, "Gradients are scaled down to this norm; 0 is off."),
                _optional("ema_decay", 0.0,
                          "Decay of the moving average that is saved instead, such as 0.99; 0 is off.", 0, 0.99999),
                _optional("max_norm", 0.0, "No layer's update gets a larger Frobenius norm than this; 0 is off."),
                io.String.Input(
                    "options",
                    default="",
                    optional=True,
                    placeholder='{"betas": [0.9, 0.99]}',
                    tooltip="Further arguments of the optimizer's own, as JSON.",
                ),
            ],
            outputs=[LOHA_OPTIMIZER.Output(display_name="optimizer", tooltip="For Train LoHa.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, options: str | None = None) -> bool | str:
        return problems(lambda: optimizer_settings(options=options or ""))

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(optimizer_settings(**values))


def optimizer_settings(
    name: str = "adamw",
    learning_rate: float = 1e-3,
    text_learning_rate: float = 0.0,
    weight_decay: float = 0.0,
    schedule: Any = "cosine",
    warmup_steps: int = 0,
    cycles: int = 1,
    end_factor: float = 0.0,
    lora_plus: float = 1.0,
    max_grad_norm: float = 1.0,
    ema_decay: float = 0.0,
    max_norm: float = 0.0,
    options: str = "",
) -> OptimizerSettings:
    """Checked values from the node's inputs."""
    more = json_object("options", options, '{"betas": [0.9, 0.99]}')
    config = OptimizerConfig(
        name, learning_rate, text_learning_rate or None, weight_decay, lora_plus, schedule, warmup_steps, cycles,
        end_factor, {key: tuple(value) if isinstance(value, list) else value for key, value in more.items()},
    )  # fmt: skip
    return OptimizerSettings(config, {"max_grad_norm": max_grad_norm, "ema_decay": ema_decay, "max_norm": max_norm})


class LoHaObjective(io.ComfyNode):
    """Which noise, and how errors count -> LOHA_OBJECTIVE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaObjective",
            display_name="LoHa Objective",
            search_aliases=["loss", "min snr"],
            category="LoHa/train",
            description="Which noise levels are trained, and how an error counts. What the model predicts is its own.",
            inputs=[
                one_of("timesteps", get_args(Timesteps),
                       "uniform: all alike. logit-normal: mostly the middle, as for SD3. shifted: more noise. "
                       "heavy-tail: SD3's mode sampling. beta: as its two numbers say."),
                number("logit_mean", 0.0, "Of logit-normal.", -10, 10, step=0.01),
                _number("logit_std", 1.0, "Of logit-normal.", 0, 10),
                _number("shift", 3.0, "Of shifted: above 1 moves towards noise.", 0, 100),
                one_of("loss_type", get_args(LossType),
                       "mse: squared error. huber: squared for small errors, linear for large ones. l1: linear."),
                _number("huber_delta", 0.1, "Where huber turns linear.", 0, 100),
                _number("min_snr_gamma", 0.0,
                        "Limits the weight of nearly clean pictures; 5 is usual, 0 is off.", 0, 1000),
                switch("debiased", "Weigh errors by 1/√SNR (debiased estimation); without min-SNR."),
                _number("noise_offset", 0.0,
                        "Noise that is one number per channel: lets pictures get darker or brighter. 0.03 to 0.1.",
                        0, 1),
                _optional("mode_scale", 1.29, "Of heavy-tail: above 0 more of the middle, below 0 more of both ends.",
                          -1, 1.75),
                _optional("beta_a", 2.0, "Of beta: the density rises as t^(a - 1) from the clean picture on.",
                          0.01, 1000),
                _optional("beta_b", 2.0, "Of beta: the density falls as (1 - t)^(b - 1) towards noise.", 0.01, 1000),
                _optional("min_timestep", 0.0, "No cleaner pictures than this are trained: 0 is clean.", 0, 0.999),
                _optional("max_timestep", 1.0, "No noisier pictures than this are trained: 1 is noise.", 0.001, 1),
                switch("resolution_shift", "More noise for larger pictures, as Flux has it: on top of the "
                       "distribution and of the model's own shift.", optional=True),
                _optional("masked_preservation", 0.0, "What masks leave out is kept as the model makes it now: its "
                          "error counts so much, against 1 within. Needs masks; 0: it may change.", 0, 1000),
            ],
            outputs=[LOHA_OBJECTIVE.Output(display_name="objective", tooltip="For Train LoHa.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, debiased: bool | None = None, min_snr_gamma: float | None = None,
        min_timestep: float | None = None, max_timestep: float | None = None,
    ) -> bool | str:  # fmt: skip
        return problems(
            lambda: Objective(debiased=bool(debiased), min_snr_gamma=min_snr_gamma or 0.0),
            lambda: Objective(
                min_timestep=min_timestep or 0.0, max_timestep=1.0 if max_timestep is None else max_timestep
            ),
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(Objective(**values))
