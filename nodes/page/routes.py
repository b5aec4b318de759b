"""What the widgets read from the server. GET only: no route writes, and every name resolves as the nodes' own do."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from aiohttp import web

from loha_core import LoHaError, load_adapter
from loha_core.formats import peft
from loha_core.formats.describe import base_model, trigger_words

from ..host import files
from . import monitor
from .blocks import bars
from .models import layout_of

# A line of text in the page, not a book: what a file says of itself is cut.
MAX_LETTERS, MAX_WORDS = 200, 50

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# What knows before a run why it would fail: a node's class by its id.
checked: dict[str, Any] = {}


def register(nodes: Iterable[Any]) -> None:
    """Add the routes to ComfyUI's server; aiohttp answers 405 to everything but GET and HEAD.

    Args:
        nodes: our classes.
    """
    from server import PromptServer  # a module of ComfyUI's that only a running server has

    monitor.tell = PromptServer.instance.send_sync
    monitor.executing = lambda: PromptServer.instance.prompt_queue.get_current_queue_volatile()[0]

    checked.update({node.__name__: node for node in nodes if "validate_inputs" in vars(node)})
    for handler in (_adapters, _info, _preview, _blocks, _layout, _problem, _training):
        PromptServer.instance.routes.get(f"/loha/{handler.__name__[1:]}")(_answering(handler))


def _answering(handler: Handler) -> Handler:
    """What a user can put right is a 400 with the reason as JSON."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            response = await handler(request)
        except LoHaError as error:
            response = web.json_response({"error": str(error)}, status=400)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return answer


async def _adapters(request: web.Request) -> web.StreamResponse:
    names, pictured = await asyncio.to_thread(lambda: (files.names(), files.pictured()))
    return web.json_response({"names": names, "pictured": pictured})


async def _training(request: web.Request) -> web.StreamResponse:
    """The latest runs (of a workflow's node), with their losses: the events say only what is new.

    A page that has ``since`` losses of a ``run`` gets the rest of that. ``preparing`` is the id of a prompt whose run
    has not begun, if there is one.
    """
    asked = {key: request.query.get(key, "") for key in ("workflow", "node", "run")}
    since = request.query.get("since", "0")
    if not (since.isascii() and since.isdecimal() and len(since) < 10):
        raise LoHaError(f"since is {since[:MAX_LETTERS]!r}; expected how many losses the page has")
    of = asked["workflow"], asked["node"]
    runs = [run.since(int(since)) if run.id == asked["run"] else run.full() for run in monitor.runs_of(*of)]
    return web.json_response({"runs": runs, "preparing": monitor.preparing(*of)})


async def _info(request: web.Request) -> web.StreamResponse:
    return web.json_response(await asyncio.to_thread(info, request.query.get("name", "")))


async def _preview(request: web.Request) -> web.StreamResponse:
    picture = await asyncio.to_thread(picture_of, request.query.get("name", ""))
    if picture is None:
        raise LoHaError("no picture lies beside this adapter")
    return web.FileResponse(picture, headers={"Content-Type": files.PICTURES[picture.suffix.lower()]})


async def _blocks(request: web.Request) -> web.StreamResponse:
    asked = {name: request.query.get(name, other) for name, other in _ASKED.items()}
    return web.json_response(await asyncio.to_thread(partial(bars, **asked)))


async def _layout(request: web.Request) -> web.StreamResponse:
    asked = (request.query.get(key, "") for key in ("folder", "name"))
    return web.json_response({"layout": await asyncio.to_thread(layout_of, *asked)})


async def _problem(request: web.Request) -> web.StreamResponse:
    asked = (request.query.get(key, "") for key in ("node", "inputs"))
    return web.json_response({"problem": await asyncio.to_thread(problem, *asked)})


def problem(node: str, inputs: str) -> str:
    """Why a run of a node with these inputs would fail, as far as `validate_inputs` knows; "" if nothing is known.

    Args:
        inputs: an object as JSON; connected inputs are left out.

    Raises:
        LoHaError: no node that can tell, or no object.
    """
    if node not in checked:
        raise LoHaError(f"{node[:MAX_LETTERS]!r}: not one of {', '.join(sorted(checked))}")
    try:
        values = json.loads(inputs)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise LoHaError(f"inputs is {inputs[:MAX_LETTERS]!r}; expected an object as JSON")
    validate = checked[node].validate_inputs
    wanted = inspect.signature(validate).parameters.items()
    # Texts become such as in ComfyUI itself.
    given = {
        name: str(values[name]) if "str" in part.annotation else values[name] for name, part in wanted if name in values
    }
    answer = validate(**given)
    return "" if answer is True else str(answer)


_ASKED = {"family": "auto", "preset": "ALL", "vector": ""}


def picture_of(name: str) -> Path | None:
    """The picture beside an adapter, by its stem: a.png or a.preview.png for a.safetensors."""
    files.resolve(name)
    stem = files.stem_of(name)
    for candidate in (f"{stem}{middle}{suffix}" for middle in ("", ".preview") for suffix in files.PICTURES):
        try:
            return _file(candidate)
        except LoHaError:
            continue
    return None


def _file(name: str) -> Path:
    path = files.resolve(name)
    if not path.is_file():
        raise LoHaError(f"{name}: not a file")
    return path


def info(name: str) -> dict[str, Any]:
    """What is in an adapter, from its header: shapes, alphas and metadata, but no factor is read.

    Raises:
        LoHaError: no such adapter, or not one that can be read.
    """
    path = files.resolve(name)
    try:
        return _info_of(name, path, files.fingerprint(name)) | {"picture": picture_of(name) is not None}
    except (LoHaError, OSError) as error:
        # The page is told names, not where ComfyUI lies.
        reason = str(error).partition("\n")[0].replace(str(path), name)
        raise LoHaError(reason if isinstance(error, LoHaError) else f"{name}: not readable ({reason})") from error


@lru_cache(maxsize=64)
def _info_of(name: str, path: Path, fingerprint: str) -> dict[str, Any]:
    adapter = load_adapter(path, values=False)
    factors = (tensor for layer in adapter.layers.values() for tensor in layer.tensors().values())
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in (*factors, *adapter.extras.values()) if t.numel() > 1)
    weights = [folder / peft.WEIGHTS_NAME for _, folder in peft.folders(path)] or [path]
    size = sum(file.stat().st_size for file in weights)
    shown = {
        "dialect": adapter.dialect,
        "base model": base_model(adapter),
        "rank": _counts(adapter.ranks),
        "alpha": _counts(Counter(f"{alpha:g}" for alpha in adapter.alphas.elements())),
        "layers": f"{len(adapter.layers)}" + (f" and {len(adapter.extras)} other tensors" if adapter.extras else ""),
        "dtype": _counts(dtypes),
        "size": f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 2**10:.1f} KB",
        "title": adapter.metadata.get("modelspec.title") or adapter.metadata.get("ss_output_name") or "",
        "note": "; ".join(adapter.notes),
    }
    words = [word[:MAX_LETTERS] for word in trigger_words(adapter)[:MAX_WORDS]]
    return {"name": name, "facts": {key: text[:MAX_LETTERS] for key, text in shown.items() if text}, "words": words}


def _counts(counter: Counter[Any]) -> str:
    return ", ".join(str(value) for value, _ in counter.most_common(4)) + ("…" if len(counter) > 4 else "")
