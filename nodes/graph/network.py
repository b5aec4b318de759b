"""The node that chooses the layers to train, and the shape of their factors."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from loha_core import LoHaConfig, LoHaError
from loha_core.errors import about
from loha_core.naming.patterns import checked
from loha_core.training.optimizers import OptimizerConfig

from ..host.layers import NetworkConfig, count
from .inputs import choice, number, one_of, problems, schema, switch
from .types import LOHA_CONFIG

# Preset -> what a layer's path must contain. Timestep, size and modulation embeddings are nobody's style.
_EMBEDDINGS = r"time_|label_emb|emb_layers|adaLN|modulation|_mod\.|[xtyc]_embedder|(img|txt|time|vector|guidance)_in"
PRESETS: dict[str, str] = {
    "blocks": rf"^(?!.*({_EMBEDDINGS})).*\.\d+\.",
    "attention": r"attn|attention|qkv",
    "attention and feed-forward": r"attn|attention|qkv|\.ff\b|mlp|feed_forward|linear[12]",
    "all": "",
}


class LoHaNetwork(io.ComfyNode):
    """Rank, alpha, … and which layers -> LOHA_CONFIG."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaNetwork",
            display_name="LoHa Network",
            search_aliases=["lora rank", "network dim"],
            category="LoHa/train",
            description="What is trained: the rank of the LoHa, which layers get one, and how it begins.",
            inputs=_inputs(),
            outputs=[
                LOHA_CONFIG.Output(display_name="network", tooltip="For the network input of Train LoHa."),
                io.String.Output(display_name="text", tooltip="How many layers and parameters this means."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, layers: str | None = None, exclude: str | None = None, patterns: str | None = None
    ) -> bool | str:
        return problems(lambda: network_config(layers=layers or "", exclude=exclude or "", patterns=patterns or ""))

    @classmethod
    def execute(cls, model: Any = None, clip: Any = None, **values: Any) -> io.NodeOutput:
        config = network_config(**values)
        text = count(config, model, clip)
        return io.NodeOutput(config, text, ui=ui.PreviewText(text))


def _inputs() -> list[Any]:
    large = "convolutions with a kernel larger than 1"
    return [
        number("rank", 8, "Rank of each half. The update reaches rank², and the file grows with the rank.", 1, 256),
        number("alpha", 8.0, "The update is scaled by alpha / rank. Equal to the rank: a scale of 1.", step=0.01),
        number("conv_rank", 8, f"Rank for {large}; 0 leaves them out.", 0, 256),
        number("conv_alpha", 8.0, f"Alpha for {large}.", step=0.01),
        one_of("preset", PRESETS,
               "Which layers: those in the model's blocks, attention alone, attention and feed-forward, or all."),
        io.String.Input(
            "layers", default="", placeholder="attn2|to_out",
            tooltip="A regular expression that a layer's path must contain, instead of the preset. Empty: the preset.",
        ),
        io.String.Input(
            "exclude", default="", optional=True, tooltip="A regular expression that a layer's path must not contain."
        ),
        io.String.Input(
            "patterns", default="", multiline=True, optional=True, placeholder="attn2.to_k: rank 16, alpha 8, lr 0.5",
            tooltip="Lines of 'pattern: rank 16, alpha 8, lr 0.5', or some of these, for layers whose path ends with "
            "the pattern, a regular expression. lr is a factor of the learning rate.",
        ),
        switch("effective_conv", f"Tucker factors for {large}: smaller files (FedPara, prop. 3).", optional=True),
        one_of("dora", ["off", "output", "input"],
               "Learn the weights' magnitude apart from their direction (DoRA), along the output or the input axis.",
               optional=True),
        switch("rank_stabilized", "Scale by alpha / √rank (rsLoRA), for high ranks.", optional=True),
        one_of("init", ["balanced", "lycoris", "peft"],
               "How the factors begin; the update is zero then. balanced: all alike, at three times the learning rate.",
               optional=True),
        switch("scalar", "A learned factor per layer that begins at zero (LyCORIS).", optional=True),
        number("rank_dropout", 0.0, "Probability to drop an output row of the update in a step.", 0, 0.99,
               step=0.01, optional=True),
        number("module_dropout", 0.0, "Probability to drop a layer's update in a step.", 0, 0.99,
               step=0.01, optional=True),
        io.Model.Input("model", optional=True, tooltip="To show how many layers this means; it is not changed."),
        io.Clip.Input("clip", optional=True, tooltip="To show how many layers this means; it is not changed."),
    ]  # fmt: skip


def network_config(
    rank: int = 8,
    alpha: float = 8.0,
    conv_rank: int = 8,
    conv_alpha: float = 8.0,
    preset: str = "blocks",
    layers: str = "",
    exclude: str = "",
    patterns: str = "",
    effective_conv: bool = False,
    dora: str = "off",
    rank_stabilized: bool = False,
    init: str = "balanced",
    scalar: bool = False,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
) -> NetworkConfig:
    """A checked configuration from the node's inputs.

    Raises:
        LoHaError: no such preset, an expression that is none, or a value out of its range.
    """
    layers, exclude = layers.strip() or choice("preset", preset, PRESETS), exclude.strip()
    for name, expression in (("layers", layers), ("exclude", exclude)):
        with about(name):
            checked(expression, anywhere=True)
    ranks, alphas, rates = _patterns(patterns)
    loha = LoHaConfig(
        r=rank, alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, use_effective_conv2d=effective_conv,
        use_dora=False if dora == "off" else dora, use_rslora=rank_stabilized, init_weights=init, use_scalar=scalar,
        rank_dropout=rank_dropout, module_dropout=module_dropout,
    )  # fmt: skip
    with about("patterns"):
        OptimizerConfig(lr_pattern=rates)  # checks them
    return NetworkConfig(loha, conv_rank, conv_alpha, layers, exclude, rates)


def _patterns(text: str) -> tuple[dict[str, int], dict[str, float], dict[str, float]]:
    """Ranks, alphas and factors of learning rates from lines of 'pattern: rank 16, alpha 8, lr 0.5'.

    Two numbers without names are the rank and the alpha.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    rates: dict[str, float] = {}
    kinds: dict[str, tuple[dict[str, Any], type]] = {
        "rank": (ranks, int), "alpha": (alphas, float), "lr": (rates, float)
    }  # fmt: skip
    for line in filter(None, map(str.strip, text.splitlines())):
        pattern, colon, values = line.rpartition(":")
        given: set[str] = set()
        for place, value in enumerate(values.split(",")):
            name, _, number = value.strip().rpartition(" ")
            name = name.strip() or ("rank", "alpha", "")[min(place, 2)]
            try:
                if not colon or name in given:
                    raise ValueError
                found, kind = kinds[name]
                found[pattern.strip()] = kind(number)
            except (KeyError, ValueError) as error:
                raise LoHaError(
                    f"patterns: {line!r}; expected 'pattern: rank 16, alpha 8, lr 0.5', or some of these"
                ) from error
            given.add(name)
    return ranks, alphas, rates
