"""``loha fed``: a Flower app with the settings of a file, by Flower's own command."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import LoHaError, about, check_known, check_number
from ...formats.toml import read_toml

SIMULATION = {"app": "", "superlink": "", "clients": 20, "cpus": 1}
TABLE = "tool.flwr.app.config"


def run(path: Path) -> str:
    """Run an app until its last round; the same command goes on with one that was cut off.

    Returns:
        What to print: the last round's scores and all bytes that were sent.

    Raises:
        LoHaError: something in the file is not as it must be, or the run did not reach its last round.
    """
    with about(path):
        settings, config = read(path)
    # Flower reads these when it is imported. Apps install nothing, and nothing is reported to anybody.
    os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    try:
        from flwr.cli.app import app
    except ImportError as error:
        raise LoHaError(f"Flower is not installed ({error}); pip install 'comfyui-loha[federated]'") from error
    try:
        app(command(settings, config))
    except SystemExit as end:
        if end.code:
            raise LoHaError(f"Flower did not run {settings['app']}; what is printed above says why") from None
    return outcome(Path(config["output"]), config["rounds"])


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A file's own settings, and the app's configuration with what the file changes of it.

    Raises:
        LoHaError: a key that is not known, a value of another type, no app, or an app without rounds and output.
    """
    values = read_toml(path)
    changes = values.pop("config", {})
    _check("key", values, SIMULATION)
    settings = {**SIMULATION, **values}
    for name in ("clients", "cpus"):
        check_number(name, settings[name], minimum=1, integer=True)
    settings["app"] = str((path.parent / settings["app"]).resolve())
    manifest = Path(settings["app"]) / "pyproject.toml"
    try:
        table: Any = read_toml(manifest)
        for part in TABLE.split("."):
            table = table[part]
    except (LoHaError, KeyError) as error:
        raise LoHaError(f"app: {manifest} has no [{TABLE}] ({error}); expected a Flower app's folder") from None
    _check("[config]", changes, table)
    config = {**table, **changes}
    if not config.get("output") or "rounds" not in config:
        raise LoHaError("[config] has no output and rounds: they say where the run's state is kept, and when it ends")
    if not settings["superlink"]:  # else the folders are other machines'
        for name in ("output", "local-state"):
            if config.get(name):
                config[name] = str((path.parent / config[name]).resolve())
    return settings, config


def command(settings: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The arguments of ``flwr``."""
    words = ["run", settings["app"], *([settings["superlink"]] if settings["superlink"] else []), "--stream"]
    words += ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())]
    if not settings["superlink"]:
        words += [
            "--federation-config",
            f"num-supernodes={settings['clients']} client-resources-num-cpus={settings['cpus']}",
        ]
    return words


def outcome(folder: Path, rounds: int) -> str:
    """What `FactorStrategy` wrote about a run.

    Raises:
        LoHaError: it has not reached its last round.
    """
    from .strategy import ROUNDS, bytes_of  # which imports Flower

    try:
        done = json.loads((folder / ROUNDS).read_text("utf-8"))
    except FileNotFoundError:
        raise LoHaError(f"{folder}: the run did no round; what is printed above says why") from None
    last = done[-1]
    if last["round"] < rounds:
        raise LoHaError(
            f"{folder}: the run ended after round {last['round']} of {rounds}; what is printed above says why. "
            "The same command goes on from there."
        )
    scores = last.get("scores") or last.get("evaluation") or {}
    sent = sum(map(bytes_of, done)) / 1e6
    said = ", ".join([*(f"{name} {value:.4g}" for name, value in scores.items()), f"{sent:.2f} MB sent and received"])
    return f"round {last['round']}: {said}; {folder}"


def _check(what: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Names and types as ``known`` has them; a whole number also where it has a fraction."""
    check_known(what, values, known)
    for name, value in values.items():
        kinds = (int, float) if isinstance(known[name], float) else (type(known[name]),)
        if type(value) not in kinds:
            raise LoHaError(f"{what} {name} is {value!r}; expected something like {known[name]!r}")
