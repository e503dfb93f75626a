"""A Plumb server of one's own, and `plumb bench` against it.

Every measurement starts a server and ends it, so that nothing of Plumb runs while other software is measured.
"""

import json
import os
import pathlib
import subprocess
import time
import urllib.request

# A server that has not loaded two small models by then never will.
START_SECONDS = 120
# A measurement that takes longer hangs.
BENCH_SECONDS = 1800


class Server:
    """A running server, in a `with` statement. `programs` is the folder of the server and the client, `models` maps names
    to sources, `folder` takes its log and ports."""

    def __init__(self, programs, folder, models, flags=(), start_seconds=START_SECONDS):
        self.programs, self.start_seconds = programs, start_seconds
        self.folder = pathlib.Path(folder)
        named = [word for name, source in models.items() for word in ("--model", f"{name}={source}")]
        self.flags = [*named, *map(str, flags)]

    def __enter__(self):
        ports = self.folder / "ports.json"
        ports.unlink(missing_ok=True)
        self.log = self.folder / "server.log"
        bound = ["--port", "0", "--prometheus-port", "0", "--port-file", ports]
        argv = [self.programs / "plumb-server", *self.flags, *bound]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=environment())
        try:
            self.addresses = self.wait(lambda: ports.exists() and ports.read_text())
            self.addresses = json.loads(self.addresses)
            self.wait(lambda: self.client("health").returncode == 0)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def wait(self, ready):
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if answer := ready():
                return answer
            time.sleep(0.2)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-500:]}")

    def client(self, *words):
        argv = [self.programs / "plumb", "--server", f"http://{self.addresses['grpc']}", *words]
        return subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=BENCH_SECONDS)

    def bench(self, *words, refusals=False):
        """The report of `plumb bench`. Calls must not fail, but for those refused under overload if `refusals`."""
        done = self.client("--json", "bench", *map(str, words))
        if not done.stdout.strip():
            raise RuntimeError(f"plumb bench {' '.join(map(str, words))}: {done.stderr.strip()[-500:]}")
        report = json.loads(done.stdout)
        others = set(report["errors"]) - ({"RESOURCE_EXHAUSTED"} if refusals else set())
        if others:
            raise RuntimeError(f"plumb bench: calls failed: {report['errors']}, for example {report.get('example')}")
        return report

    def metrics(self):
        """Samples by name; those of several labels are added up."""
        with urllib.request.urlopen(f"http://{self.addresses['metrics']}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        sums = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], float(line.rsplit(" ", 1)[1])
                sums[name] = sums.get(name, 0.0) + value
        return sums


def command(flags, words):
    """What to type for the same figure."""
    return f"plumb-server {' '.join(map(str, flags))}; plumb --json bench {' '.join(map(str, words))}"


def environment():
    """Without options of Plumb that the caller happens to have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PLUMB_", "RUST_LOG"))}
