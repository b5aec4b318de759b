"""Federated adapters, the app in examples/federated, and `loha fed`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomllib
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from benchmarks.federated.grid import InProcess
from benchmarks.federated.loopback import end, free_port
from examples.federated.fedloha import client_app, methods, server_app
from loha_core.algebra import factor_shapes
from loha_core.cli import main
from loha_core.errors import LoHaError
from loha_core.federated.flower.adapters import AdapterFedAvg
from loha_core.federated.flower.client import answer
from loha_core.federated.flower.records import to_record
from loha_core.federated.flower.run import SIMULATION, outcome, read
from loha_core.federated.flower.run import run as start
from loha_core.federated.flower.strategy import FactorStrategy

from .processes import PATIENCE
from .test_federated import close, run

EXAMPLES = Path(__file__).parents[2] / "examples"
APP = tomllib.loads((EXAMPLES / "federated" / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
SMALL = {**APP, "data": "digits", "net": "mlp", "rounds": 2, "epochs": 1}


# --- adapters --------------------------------------------------------------------------------------------------------


def factors(rank: int, seed: int, out: int = 6, inner: int = 5, tucker: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = factor_shapes((out, inner, 3) if tucker else (out, inner), rank, tucker)
    return {f"proj.hada_{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def update(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """ΔW at scale 1, in float64."""
    a1, b1, a2, b2 = (state[f"proj.hada_{name}"].double() for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "proj.hada_t1" not in state:
        return (a1 @ b1) * (a2 @ b2)
    first, second = (state[f"proj.hada_{name}"].double() for name in ("t1", "t2"))
    return torch.einsum("pqk,po,qi->oik", first, a1, b1) * torch.einsum("pqk,po,qi->oik", second, a2, b2)


def mean_update(states: dict[int, dict[str, torch.Tensor]]) -> torch.Tensor:
    """Weighted as `adapting` weighs."""
    return sum(node * update(state) for node, state in states.items()) / sum(states)


def adapting(states: dict[int, dict[str, torch.Tensor]]) -> ClientApp:
    """Node n answers with an adapter of its own and weighs n."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return answer(message, states[context.node_id], context.node_id, {})

    return app


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_exact_aggregation_is_nearer_to_the_mean_of_updates_than_factors_and_says_what_is_left(rank, tucker):
    states = {node: factors(rank, node, tucker=tucker) for node in (1, 2, 3)}
    mean, errors = mean_update(states), {}
    for aggregation in ("exact", "factors"):
        strategy = AdapterFedAvg(aggregation=aggregation, outlier=1e9)
        found = run(strategy, app=adapting(states), nodes=3, arrays=to_record(factors(rank, 0, tucker=tucker)))
        errors[aggregation] = float((update(found) - mean).norm() / mean.norm())
        assert strategy.rounds[1]["error"] == pytest.approx(errors[aggregation], rel=1e-3, abs=1e-5)
        assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in states[1].items()}
    assert errors["exact"] < 0.9 * errors["factors"]


@pytest.mark.parametrize("zero", ["w2_b", "w2_a"])
def test_exact_aggregation_leaves_the_factors_as_large_as_training_made_them(zero):
    """A young update is small: were all its factors small, no gradient would reach them."""
    start = factors(2, 0)
    start[f"proj.hada_{zero}"].zero_()
    states = {}
    for node in (1, 2):
        states[node] = {key: t.clone() for key, t in start.items()}
        states[node][f"proj.hada_{zero}"] += 1e-3 * factors(2, node)[f"proj.hada_{zero}"]
    strategy = AdapterFedAvg(aggregation="exact", outlier=1e9)
    found = run(strategy, app=adapting(states), nodes=2, arrays=to_record(start))
    mean = mean_update(states)
    # One factor alone has changed, so that the mean of the factors is the mean of the updates.
    assert float((update(found) - mean).norm() / mean.norm()) < 1e-5 and strategy.rounds[1]["error"] < 1e-5
    for key in start:
        expected = sum(node * states[node][key] for node in states) / 3
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-7)


def test_the_mean_of_factors_is_flowers_and_its_distance_is_said():
    states = {node: factors(2, node) for node in (1, 2, 3)}
    strategy = AdapterFedAvg(aggregation="factors", outlier=1e9)
    found = run(strategy, app=adapting(states), nodes=3, arrays=to_record(factors(2, 0)))
    assert close(found, {key: sum(node * states[node][key] for node in states) / 6 for key in states[1]})
    mean = mean_update(states)
    error = float((update(found) - mean).norm() / mean.norm())
    assert strategy.rounds[1]["error"] == pytest.approx(error, rel=1e-3) and error > 0.1


def test_exact_aggregation_takes_clients_of_different_ranks_and_factors_refuses_them():
    states = {1: factors(1, 1), 2: factors(2, 2), 3: factors(3, 3)}
    strategy = AdapterFedAvg(aggregation="exact", outlier=1e9)
    start, mean = factors(5, 0), mean_update(states)
    found = run(strategy, app=adapting(states), nodes=3, arrays=to_record(start))
    error = float((update(found) - mean).norm() / mean.norm())
    assert error == pytest.approx(strategy.rounds[1]["error"], rel=1e-3, abs=1e-5) and error < 0.05
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in start.items()}
    strategy = AdapterFedAvg(aggregation="factors", outlier=1e9)
    run(strategy, app=adapting(states), nodes=3, arrays=to_record(factors(2, 0)))
    assert sorted(text[:7] for text in strategy.rounds[1]["refused"]) == ["node 1:", "node 3:"]


def test_an_adapter_of_another_layer_is_refused_by_name():
    nan = factors(2, 2)
    nan["proj.hada_w1_b"][0, 0] = float("nan")
    other = {key.replace("proj", "other"): t for key, t in factors(2, 3).items()}
    half = {key: t for key, t in factors(2, 4).items() if "w2_b" not in key}
    states = {1: factors(2, 1, out=7), 2: nan, 3: other, 4: half, 5: factors(2, 5)}
    strategy = AdapterFedAvg(aggregation="exact", outlier=1e9)
    run(strategy, app=adapting(states), nodes=5, arrays=to_record(factors(2, 0)))
    text = "\n".join(strategy.rounds[1]["refused"])
    assert len(strategy.rounds[1]["refused"]) == 4
    for words in ("node 1: proj is (7, 5)", "node 2: proj.hada_w1_b: 1 of", "node 3: proj is missing", "node 4: proj"):
        assert words in text, text


# --- the app ---------------------------------------------------------------------------------------------------------


class Watching(InProcess):
    """Keeps the names of the arrays in all messages."""

    seen: set[str]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        messages = list(messages)
        replies = list(super().send_and_receive(messages))
        for message in messages + replies:
            for record in message.content.array_records.values():
                self.seen |= set(record)
        return replies


@pytest.mark.parametrize(
    "method", ["plain", "low-rank", "fedpara", "pfedpara", "pfedpara-head", "fedper", "local", "adapter"]
)
def test_only_what_is_shared_travels(method):
    config = {**SMALL, "method": method, "split": "two", "rounds": 1}
    grid = Watching(client_app.app, 10, config)
    grid.seen = set()
    strategy = server_app.run(grid, config)
    own = methods.learner(config)
    assert grid.seen == set(own.shared)
    assert not grid.seen & set(own.private)
    assert bool(own.private) == (method in ("pfedpara", "pfedpara-head", "fedper", "local"))
    assert not strategy.rounds[-1]["refused"] and strategy.rounds[-1]["answers"] == 10
    parts = {part for key in own.shared for part in key.split(".")}
    if "fedpara" in method:
        assert {"w1_a", "w1_b"} <= parts and "first.weight" not in own.shared
    if "pfedpara" in method:
        assert not {"w2_a", "w2_b"} & parts
    if method == "adapter":
        assert all("hada_" in key for key in own.shared)


def test_a_run_with_local_halves_is_resumed_equal(tmp_path):
    def ran(name: str, *ends: int) -> FactorStrategy:
        config = {**SMALL, "method": "pfedpara", "split": "two", "gamma": 0.3}
        config |= {"output": str(tmp_path / name), "local-state": str(tmp_path / f"{name}-clients")}
        for rounds in ends:
            config["rounds"] = rounds
            strategy = server_app.run(InProcess(client_app.app, 10, config), config)
        return strategy

    whole, cut = ran("whole", 3), ran("cut", 1, 3)
    assert cut.resumed_from == 1
    assert cut.rounds == whole.rounds
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


ALONE = """
import json, sys
from benchmarks.federated.grid import InProcess
from examples.federated.fedloha import client_app, server_app
config = json.loads(sys.argv[1])
server_app.run(InProcess(client_app.app, 4, config), config)
"""


def test_a_server_that_is_killed_amid_a_round_goes_on_as_if_it_had_not_been(tmp_path):
    config = {**SMALL, "method": "fedpara", "split": "iid", "rounds": 6, "epochs": 4, "fraction": 0.5}

    def process(folder: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", ALONE, json.dumps({**config, "output": str(folder)})]
        return subprocess.Popen(words, cwd=EXAMPLES.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def rounds(folder: Path) -> list[dict]:
        path = folder / "rounds.json"
        return json.loads(path.read_text("utf-8")) if path.is_file() else []

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    killed = process(cut)
    until = time.monotonic() + PATIENCE
    while len(rounds(cut)) < 3:
        assert killed.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert len(rounds(cut)) < 7  # it was amid the run
    assert process(cut).wait(PATIENCE) == 0
    config["output"] = str(whole)
    server_app.run(InProcess(client_app.app, 4, config), config)
    assert rounds(cut) == rounds(whole) and len(rounds(cut)) == 7
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# --- `loha fed` ------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    path = folder / "fed.toml"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clints = 3", ["unknown key 'clints'", "clients"]),
        ("clients = 2.5", ["clients is 2.5"]),
        ("clients = 0", ["clients is 0"]),
        ('app = "nowhere"', ["nowhere", "[tool.flwr.app.config]"]),
        ("[config]\nmethd = 'x'", ["unknown [config] 'methd'", "method"]),
        ("[config]\nrounds = 'many'", ["rounds is 'many'"]),
        ("[config]\nrounds = 1", ["no output"]),
        ("not toml", ["cannot be read as TOML"]),
    ],
)
def test_a_file_that_makes_no_run_is_refused_by_name(text, words, tmp_path):
    app = f"app = {json.dumps(str(EXAMPLES / 'federated'))}\n" if "app" not in text else ""
    with pytest.raises(LoHaError) as error:
        read(written(tmp_path, app + text))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_example_file_has_every_key():
    settings, config = read(EXAMPLES / "federated.toml")
    assert settings.keys() == SIMULATION.keys() and config.keys() == APP.keys()
    assert config["output"] == str(EXAMPLES / "federated-run")
    text = (EXAMPLES / "federated.toml").read_text("utf-8")
    assert all(f"\n{key} = " in text for key in SIMULATION)


def test_a_run_that_ended_early_is_an_error(tmp_path):
    with pytest.raises(LoHaError, match="did no round"):
        outcome(tmp_path, 3)
    (tmp_path / "rounds.json").write_text(json.dumps([{"round": 0}, {"round": 1}]))
    with pytest.raises(LoHaError, match="after round 1 of 3"):
        outcome(tmp_path, 3)


def test_without_flower_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr.cli.app", None)
    with pytest.raises(LoHaError, match=r"comfyui-loha\[federated\]"):
        start(EXAMPLES / "federated.toml")


@contextmanager
def superlink(folder: Path) -> Iterator[str]:
    """The address of a SuperLink that simulates."""
    address, path = f"127.0.0.1:{free_port()}", folder / "superlink.log"
    environment = {
        **os.environ, "FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    words = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", address.split(":")[1]]
    with path.open("w") as log:
        process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + PATIENCE
        while "SuperLinkLifespan: start" not in path.read_text("utf-8"):
            assert process.poll() is None and time.monotonic() < until, path.read_text("utf-8")
            time.sleep(0.1)
        yield address
    finally:
        end(process)


def test_loha_fed_simulates_a_run_and_equals_one_in_this_process(tmp_path, monkeypatch, capfd):
    """Flower's own command, a SuperLink of its own, and ray: the slow one."""
    config = {"data": "digits", "net": "mlp", "method": "fedpara", "rounds": 2, "epochs": 1, "seed": 3}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
    path = written(
        tmp_path,
        f"app = {json.dumps(str(EXAMPLES / 'federated'))}\nsuperlink = 'here'\n"
        f"[config]\n{lines}\noutput = {json.dumps(str(tmp_path / 'run'))}\n",
    )
    expected = {**APP, **config}
    strategy = server_app.run(InProcess(client_app.app, 2, expected), expected)
    with superlink(tmp_path) as address:
        monkeypatch.setenv("FLWR_HOME", str(tmp_path))
        (tmp_path / "config.toml").write_text(
            f"[superlink]\ndefault = 'here'\n[superlink.here]\naddress = '{address}'\ninsecure = true\n"
        )
        assert main(["fed", str(path)]) == 0, (tmp_path / "superlink.log").read_text("utf-8")[-3000:]
    assert capfd.readouterr().out.splitlines()[-1].startswith("round 2: loss")
    found = json.loads((tmp_path / "run" / "rounds.json").read_text("utf-8"))
    assert found == json.loads(json.dumps(strategy.rounds))  # who took part, the bytes, the scores: all of it
