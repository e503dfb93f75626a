"""A real server for the tests, and nothing of the developer's shell."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import plumb_client

ROOT = Path(__file__).resolve().parents[3]
FIXTURES = ROOT / "tests" / "fixtures"
PATIENCE = 60.0
"""How long something that has to happen may take on a busy machine."""

for name in [name for name in os.environ if name.startswith("PLUMB_") and name != "PLUMB_TEST_BINARIES"]:
    del os.environ[name]


def binary(name: str) -> Path:
    """A program of the working tree. The Rust test that runs these tests builds it and says where it lies."""
    folder = (
        os.environ.get("PLUMB_TEST_BINARIES") or Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug"
    )
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"there is no {path}; PLUMB_TEST_BINARIES names the folder of the programs")
    return path


class Server:
    """A server that runs."""

    def __init__(self, address: str, environment: dict[str, str]) -> None:
        self.address, self.environment = address, environment
        self.url = f"http://{address}"

    def plumb(self, *arguments: str, stdin: str = "") -> str:
        """What the `plumb` command says."""
        command = [binary("plumb"), "--server", self.url, *arguments]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=self.environment, timeout=PATIENCE
        )
        assert done.returncode in (0, 1), done.stderr
        return done.stdout


@contextlib.contextmanager
def running(folder: Path, *arguments: str) -> Iterator[Server]:
    """A server with these arguments, killed at the end."""
    hidden = ("PLUMB_", "HF_", "RUST_LOG")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    ports = folder / "ports.json"
    variables = {
        "PLUMB_PORT": "0",
        "PLUMB_PROMETHEUS_PORT": "0",
        "PLUMB_PORT_FILE": str(ports),
        "PLUMB_THREADS": "1",
        "PLUMB_KV_CACHE_MIB": "16",
        # How much is let in would follow from the speed, which is any in a test.
        "PLUMB_MAX_QUEUE_TOKENS": "1048576",
        "HF_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "log").open("w") as log:
        command = [binary("plumb-server"), *arguments]
        process = subprocess.Popen(command, env={**environment, **variables}, stdout=log, stderr=log)
        try:
            began = time.monotonic()
            while not ports.exists():
                alive = process.poll() is None and time.monotonic() - began < PATIENCE
                assert alive, (folder / "log").read_text()
                time.sleep(0.005)
            yield Server(json.loads(ports.read_text())["grpc"], environment)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The bundled models, and two that Transformers has computed."""
    models = [
        *("--model", "pm=bundled:pm", "--model", "lm=bundled:lm"),
        *("--model", f"llama-pm={FIXTURES / 'llama-pm'}", "--model", f"llama-lm={FIXTURES / 'llama-lm'}"),
    ]
    options = ["--dtype", "f32", "--max-client-batch-size", "64"]
    with running(tmp_path_factory.mktemp("server"), *models, *options) as started:
        with plumb_client.Client(started.url) as client:
            client.wait_ready(PATIENCE)
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[plumb_client.Client]:
    with plumb_client.Client(server.url, model="pm") as client:
        yield client


def expected(name: str) -> dict:
    """What Transformers computed from a fixture."""
    return json.loads((FIXTURES / name / "expected.json").read_text())
