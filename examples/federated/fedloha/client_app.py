"""What runs on a client. Its pictures stay there, and so does its half of what it learns with pFedPara."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from loha_core.federated.flower.client import answer, keep, recall, receive

from . import data
from .methods import learner
from .training import learn, score

app = ClientApp()


def _place(context: Context) -> tuple[int, Path | None]:
    """Which client this is, and where it writes what it keeps."""
    client = int(context.node_config["partition-id"])
    folder = str(context.run_config["local-state"])
    return client, Path(folder) / f"client-{client}.safetensors" if folder else None


def _data(context: Context, client: int) -> tuple[torch.Tensor, ...]:
    config, clients = context.run_config, int(context.node_config["num-partitions"])
    adapting = config["method"] == "adapter"
    return data.client_data(config["data"], config["split"], clients, client, int(config["seed"]), adapting)


@app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)  # many clients share a machine's cores
    config = context.run_config
    own, (client, path) = learner(config), _place(context)
    recall(context, own.private, path)
    settings = receive(message, own.shared)
    x, y, *_ = _data(context, client)
    turn = int(settings["server-round"])
    seed = hash((int(config["seed"]), turn, client)) % 2**31
    local = {**config, "lr": config["lr"] * config["lr-decay"] ** (turn - 1)}
    loss = learn(own, own.see(x), y, local, float(settings.get("proximal-mu", 0.0)), seed)
    keep(context, own.private, path)
    return answer(message, own.shared, len(y), {"train-loss": loss})


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    own, (client, path) = learner(context.run_config), _place(context)
    recall(context, own.private, path)
    receive(message, own.shared)
    *_, x, y = _data(context, client)
    return answer(message, None, len(y), score(own, own.see(x), y))
