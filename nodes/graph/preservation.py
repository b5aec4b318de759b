"""The node that keeps what a model makes of the class while a thing of it is learned."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from loha_core.training.losses.preservation import Preservation
from loha_core.training.objectives import Objective

from .inputs import number, schema
from .types import LOHA_OBJECTIVE


class LoHaPreservation(io.ComfyNode):
    """Trigger word and class -> LOHA_OBJECTIVE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoHaPreservation",
            display_name="LoHa Preservation",
            search_aliases=["differential output preservation", "prior preservation", "dop"],
            category="LoHa/train",
            description="While 'sks dog' is learned, 'dog' stays what it is to the model: in a second pass of each "
            "step its own output without the LoHa is what it is to keep. Needs no pictures.",
            inputs=[
                io.String.Input(
                    "trigger_word",
                    default="",
                    tooltip="What stands for the thing in the captions, such as 'sks dog'.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="What takes its place, such as 'dog'. Several, with commas between them: one of them each "
                    "time.",
                ),
                number("weight", 1.0, "How much this counts in the loss, against 1 for what is learned.",
                       0.01, 1000, step=0.01),
                LOHA_OBJECTIVE.Input(
                    "objective", optional=True, tooltip="From LoHa Objective, to add this to. Empty: its defaults."
                ),
            ],
            outputs=[LOHA_OBJECTIVE.Output(display_name="objective", tooltip="For Train LoHa.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, trigger_word: str, class_word: str, weight: float, objective: Objective | None = None
    ) -> io.NodeOutput:
        preservation = Preservation(trigger_word, tuple(class_word.split(",")), weight)
        return io.NodeOutput(replace(objective or Objective(), preservation=preservation))
