"""A deployment on this machine: a SuperLink with TLS, three SuperNodes, one of which is killed amid a round.

    python -m benchmarks.federated.loopback

Prints what ``rounds.json`` says of each round, and fails if the run did not reach its last one. It takes some
minutes: a SuperNode starts a Python for each message.
"""

from __future__ import annotations

import argparse
import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
ROUNDS, NODES, PATIENCE = 4, 3, 900


def certificates(folder: Path) -> None:
    """ca.crt, server.crt and server.key for this machine: an authority of our own, and what it signs."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"loopback {name}")]) for name in keys}
    for name in keys:
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[name])
            .issuer_name(names["ca"])
            .public_key(keys[name].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[name].public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key()), critical=False)
        )
        if name == "server":
            places = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
            builder = builder.add_extension(x509.SubjectAlternativeName(places), critical=False)
        signed = builder.sign(keys["ca"], hashes.SHA256())
        (folder / f"{name}.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "server.key").write_bytes(keys["server"].private_bytes(serialization.Encoding.PEM, *form))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def processes() -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Where started processes are put; each has a session of its own, which ends here."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        yield started
    finally:
        for process in started.values():
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def start(name: str, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """A command of Flower's, with its output in ``<name>.log``."""
    environment = {
        **os.environ, "FLWR_HOME": str(folder / name), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)


def rounds(folder: Path) -> list[dict[str, Any]]:
    """Those that are done, the one before the first included."""
    path = folder / "run" / "rounds.json"
    found: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return [each for each in found if "scores" in each]


def wait(done: int, until: float, folder: Path, runner: subprocess.Popen[bytes]) -> None:
    """Until so many rounds are done."""
    while len(rounds(folder)) <= done:
        if time.monotonic() > until or (runner.poll() is not None and len(rounds(folder)) <= done):
            logs = "".join(f"\n--- {p.name}\n{p.read_text('utf-8')[-2000:]}" for p in sorted(folder.glob("*.log")))
            raise SystemExit(f"round {done} did not come to its end:{logs}")
        time.sleep(0.1)


def deploy(folder: Path) -> list[dict[str, Any]]:
    """The whole run; returns its rounds."""
    certificates(folder)
    port, until = free_port(), time.monotonic() + PATIENCE
    home = folder / "runner"
    home.mkdir()
    ca = str(folder / "ca.crt")
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n[superlink.loopback]\naddress = "{HOST}:{port}"\n'
        f"root-certificates = {json.dumps(ca)}\n"
    )
    with processes() as started:
        started["superlink"] = start(
            "superlink", folder, "flower-superlink", "--host", HOST, "--port", str(port), "--ssl-ca-certfile", ca,
            "--ssl-certfile", str(folder / "server.crt"), "--ssl-keyfile", str(folder / "server.key"),
        )  # fmt: skip

        def node(place: int) -> subprocess.Popen[bytes]:
            return start(
                f"node{place}", folder, "flower-supernode", "--superlink", f"{HOST}:{port}", "--root-certificates", ca,
                "--port", str(free_port()), "--node-config", f"partition-id={place} num-partitions={NODES}",
            )  # fmt: skip

        time.sleep(5)
        for place in range(NODES):
            started[f"node{place}"] = node(place)
        changes = {
            "output": str(folder / "run"), "rounds": ROUNDS, "min-clients": 2, "timeout": 120.0, "epochs": 4,
            "method": "plain", "split": "iid",
        }  # fmt: skip
        time.sleep(8)
        words = " ".join(f"{key}={json.dumps(value)}" for key, value in changes.items())
        runner = start("runner", folder, "flwr", "run", "examples/federated", "--stream", "--run-config", words)
        started["runner"] = runner
        wait(1, until, folder, runner)
        time.sleep(2)
        print("round 2 is under way: SuperNode 2 is killed", flush=True)
        end(started["node2"])
        wait(2, until, folder, runner)
        print("and comes back", flush=True)
        started["back"] = node(2)
        wait(ROUNDS, until, folder, runner)
        return rounds(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federated.loopback", description=__doc__)
    parser.add_argument("--keep", type=Path, help="a folder for logs and state; a temporary one by default")
    o = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = o.keep.resolve() if o.keep else Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for each in deploy(folder)[1:]:
            who = f"{each['answers']} of {each['nodes']} answered"
            print(f"round {each['round']}: {who}, accuracy {each['scores']['accuracy']:.3f}")


if __name__ == "__main__":
    main()
