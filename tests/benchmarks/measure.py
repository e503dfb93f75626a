"""The measurements. Each is a function of a Job; its values go to the recorder under a work and a name.

Sizes are those of a preference model at work: 135M parameters, 256 tokens, 32 items a call.
"""

import dataclasses
import gzip
import json
import math
import os
import pathlib
import shlex
import statistics
import sys
import tempfile
import time

import criterion
import peers
import plumb
import process
from recorder import Recorder

HERE = pathlib.Path(__file__).parent
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# Pairs of real texts; both sides, 32 a call, are 10 whole calls, so that no text comes twice.
PAIRS, TEXTS_A_CALL = 160, 32
# As model/benches/forward.rs names it.
FORWARD = "300 tokens"
CACHE_MIB = 256
# The server shows its memory every 5 s.
SHOWN_SECONDS = 6
ITEMS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CALL_TOKENS = 8192
RATES = (10, 25, 50, 75, 90, 100, 150, 200)
LOAD_ITEMS, LOAD_TOKENS = 4, 256
# Calls that may be queued: two batches of 4,096 tokens, so that one is ready when the other is done.
QUEUED_CALLS = 8


# How fast a process reads its memory depends on where the system puts it: up to half as fast again. What is bound by
# that is measured in so many processes, and the median counts.
MEMORY_PROCESSES = 5


@dataclasses.dataclass
class Job:
    """What measurements need. `quick` shrinks them until the figures mean nothing."""

    root: pathlib.Path
    peers: peers.Peers
    recorder: Recorder
    options: object
    folder: pathlib.Path

    @property
    def quick(self):
        return self.options.quick

    def few(self, count, least=1):
        """A number of requests or items."""
        return max(least, count // 16) if self.quick else count

    def server(self, *names, flags=()):
        sources = {"pm": self.peers.folder / "pm", "lm": self.peers.folder / "smollm2", "gguf": self.peers.gguf}
        return plumb.Server(self.root / "target/release", self.folder, {name: sources[name] for name in names}, flags)

    def bench(self, server, work, value, unit, *words, **more):
        """One value from `plumb bench`; `value` takes it out of the report."""
        refusals = more.pop("refusals", False)
        report = server.bench(*words, refusals=refusals)
        command = plumb.command(server.flags, words)
        self.recorder.add(work, "plumb", value(report), unit, command, raw=report, **more)
        return report

    def alone(self, model, work, value, unit, *words):
        """The same, with a server of its own."""
        with self.server(model) as server:
            return self.bench(server, work, value, unit, *words)

    def peer(self, name, argv, *wanted):
        """The best values that a peer's script prints: `wanted` are work, name, unit and pattern of the line."""
        if self.peers.missing(name):
            return
        for variant, environment in self.variants(name):
            with self.recorder.guard(f"{argv[0].name} {argv[-1]}{variant}"):
                # It may end as it likes once it has printed its figures: vLLM sometimes aborts on its way out.
                done = process.run([self.peers.python(name), *argv], check=False, **OFFLINE, **environment)
                settings = "".join(f"{key}={value} " for key, value in environment.items())
                command = settings + shlex.join(map(str, [self.peers.python(name), *argv]))
                for work, who, unit, pattern in wanted:
                    lines, values = peers.figures(done, pattern)
                    self.recorder.add(work, who + variant, max(values), unit, command, raw=lines)

    def variants(self, name):
        """Ways to run a peer. vLLM leaves a core to its scheduler, which is much where there are two: once, try all."""
        if name != "vllm" or self.recorder.round > 1:
            return [("", {})]
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        return [("", {}), (", all cores", {"VLLM_CPU_OMP_THREADS_BIND": cores})]


def limits(job):
    """What the machine can do at most: bf16 multiply-adds and sequential reads"""
    # A multiply-add is two operations.
    for function, unit, operations in (("bf16 matrix loop", "GFLOP/s", 2), ("reads", "GB/s", 1)):
        filters = ["--", f"^limits/{function}$", "--noplot"] + ["--quick"] * job.quick
        argv = ["cargo", "bench", "-p", "plumb-kernels", "--bench", "kernels", *filters]
        runs = [criterion.run(job.root, argv, "limits")[function] for _ in range(MEMORY_PROCESSES if unit == "GB/s" else 1)]
        values = [operations * run["per_iteration"] / run["ns"] for run in runs]
        job.recorder.add("limits", function, statistics.median(values), unit, shlex.join(argv), raw=runs)


def score(job):
    """Unique sequences, and candidates behind shared prompts"""
    words = ["--items", job.few(32), "--tokens", 256, "--concurrency", 1, "--requests", job.few(8)]
    job.alone("pm", "unique", input_rate, "tok/s", "unique", "--model", "pm", *words)
    pm = job.peers.folder / "pm"
    for dtype in ("bf16", "f32"):
        sizes = (1, 32) if job.quick else (8, 256)
        argv = [job.peers.scripts / "score_torch.py", pm, dtype, *map(str, sizes)]
        job.peer("torch", argv, ("unique", f"torch {dtype}", "tok/s", r"^torch.* ([\d.]+) tok/s"))
    both = [("unique", "vllm", "tok/s", r"^vllm unique.* ([\d.]+) tok/s"),
            ("rank", "vllm", "seq/s", r"^vllm rank.* ([\d.]+) seq/s")]  # fmt: skip
    job.peer("vllm", [job.peers.scripts / "score_vllm.py", pm], *both)
    words = ["--prompts", 4, "--candidates", 8, "--prompt-tokens", 512, "--tokens", 64, "--requests", job.few(12, 4)]
    job.alone("pm", "rank", lambda r: r["sequences_per_s"], "seq/s", "rank", "--model", "pm", *words)


def text(job):
    """Real dialogues of mixed lengths, both sides of every pair"""
    texts = read_texts(job.options.texts, job.few(PAIRS))
    path = job.folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    call = min(TEXTS_A_CALL, len(texts))
    words = ["--items", call, "--concurrency", 1, "--requests", len(texts) // call, "--warmup-secs", 0, path]
    with job.server("pm") as server:
        # Threads and memory are warmed up with tokens that no text begins with.
        server.bench("unique", "--model", "pm", "--items", 4, "--concurrency", 1, "--requests", 4, "--warmup-secs", 0)
        report = job.bench(server, "text", input_rate, "tok/s", "file", "--model", "pm", *words)
    # A peer that counts other tokens does other work.
    tokens = report["input_tokens"]
    for name in ("torch", "vllm"):
        argv = [HERE / f"peer_scripts/text_{name}.py", job.peers.folder / "pm", path]
        job.peer(name, argv, ("text", name, "tok/s", rf"^{name} text, {tokens} tokens: ([\d.]+) tok/s"))


def read_texts(paths, pairs):
    """Both sides of the first pairs of every file, as many from each."""
    if not paths:
        raise RuntimeError("real texts need --texts")
    texts = []
    for number, path in enumerate(paths):
        share = pairs * (number + 1) // len(paths) - pairs * number // len(paths)
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
            lines = [json.loads(line) for line, _ in zip(file, range(share))]
        if len(lines) < share:
            raise RuntimeError(f"{path.name} has fewer than {share} pairs")
        texts += [line[side] for line in lines for side in ("chosen", "rejected")]
    return texts


def single(job):
    """One request of 300 tokens on an idle server, and the forward pass without one"""
    words = ["--items", 1, "--tokens", 300, "--concurrency", 1, "--requests", job.few(60)]
    job.alone("pm", "single", latency, "ms", "unique", "--model", "pm", *words)
    models = str(job.peers.folder)
    argv = ["cargo", "bench", "-p", "plumb-model", "--bench", "forward", "--", f"^forward/{FORWARD}$", "--noplot"]
    found = criterion.run(job.root, argv + ["--quick"] * job.quick, "forward", PLUMB_MODELS=models)
    if FORWARD not in found:
        raise RuntimeError(f"the benchmark did not time {FORWARD!r}, only {list(found)}")
    command = f"PLUMB_MODELS={models} {shlex.join(argv)}"
    job.recorder.add("single", "forward pass", found[FORWARD]["ns"] / 1e6, "ms", command, raw=found[FORWARD])


def decode(job):
    """New tokens: one stream, 16, and 16 behind 6,000 shared tokens"""
    words = ["generate", "--model", "lm", "--prompt-tokens", 32, "--new-tokens", job.few(128, 8)]
    one = [*words, "--streams", 1, "--requests", job.few(4)]
    reports = []
    for _ in range(MEMORY_PROCESSES):
        with job.server("lm") as server:
            reports.append(server.bench(*one))
            command = plumb.command(server.flags, one)
    for who, rate in (("plumb", output_rate), ("plumb, after the first token", stream_rate)):
        value = statistics.median(map(rate, reports))
        job.recorder.add("decode 1", who, value, "tok/s", command, raw=reports if who == "plumb" else None)
    many = [*words, "--streams", 16, "--requests", 16 if job.quick else 32]
    job.alone("lm", "decode 16", output_rate, "tok/s", *many)
    vllm = lambda streams: rf"^vllm decode {streams} streams.* ([\d.]+) tok/s"  # noqa: E731
    script, model = job.peers.scripts / "generate_vllm.py", job.peers.folder / "smollm2"
    wanted = [(f"decode {n}", "vllm", "tok/s", vllm(n)) for n in (1, 16)]
    job.peer("vllm", [script, model, "32"], *wanted)
    shared = 256 if job.quick else 6000
    job.alone("lm", "decode 16 shared", output_rate, "tok/s", *many, "--shared-prompt-tokens", shared)
    job.peer("vllm", [script, model, str(shared)], ("decode 16 shared", "vllm", "tok/s", vllm(16)))


def gguf(job):
    """A file quantised to Q4_1: a prompt of 512 tokens, and one stream"""
    if not job.peers.gguf:
        return
    prompt, new = (64, 8) if job.quick else (512, 64)
    words = ["generate", "--model", "gguf", "--streams", 1, "--requests", job.few(8)]
    first = lambda r: prompt / r["generation"]["first_token_ms"]["p50"] * 1e3  # noqa: E731
    with job.server("gguf") as server:
        for work, value, tokens, more in (("gguf prefill", first, prompt, 1), ("gguf decode", stream_rate, 32, new)):
            sizes = ["--prompt-tokens", tokens, "--new-tokens", more]
            job.bench(server, work, value, "tok/s", *words, *sizes)
    if not job.peers.missing("llama"):
        with job.recorder.guard("llama-bench"):
            llama(job, prompt, new)


def llama(job, prompt, new):
    program = job.peers.llama_bench
    cores = job.recorder.results["cores"]
    argv = [program, "-p", str(prompt), "-n", str(new), "-t", str(cores), "-m", job.peers.gguf, "-o", "json"]
    for test in json.loads(process.run(argv, LD_LIBRARY_PATH=str(program.parent)).stdout):
        work = "gguf decode" if test["n_gen"] else "gguf prefill"
        kept = {key: test[key] for key in ("build_commit", "build_number", "n_threads", "avg_ts", "samples_ts")}
        job.recorder.add(work, "llama", max(test["samples_ts"]), "tok/s", argv, raw=kept)


def memory(job):
    """Resident memory of a server whose cache is full"""
    # Twice 8,192 tokens, at 22.5 KiB each, are more than the cache holds.
    words = ["unique", "--model", "pm", "--items", 32, "--concurrency", 1, "--requests", 2, "--warmup-secs", 0]
    with job.server("pm", flags=["--kv-cache-mib", CACHE_MIB]) as server:
        server.bench(*words)
        time.sleep(SHOWN_SECONDS)
        found = server.metrics()
        command = f"{plumb.command(server.flags, words)}; curl METRICS/metrics"
    mib = {name: found[f"plumb_{name}"] / 2**20 for name in ("resident_memory_bytes", "model_weight_bytes")}
    job.recorder.add("memory", "plumb", mib["resident_memory_bytes"], "MiB", command)
    job.recorder.add("memory", "weights and cache", mib["model_weight_bytes"] + CACHE_MIB, "MiB", command)


def train(job):
    """A step of preference training: four pairs of 512 tokens whose first half is shared"""
    models = str(job.peers.folder)
    argv = ["cargo", "bench", "-p", "plumb-trainer", "--bench", "step", "--", "^train/shared$", "--noplot"]
    found = criterion.run(job.root, argv + ["--quick"] * job.quick, "train", PLUMB_MODELS=models)["shared"]
    command = f"PLUMB_MODELS={models} {shlex.join(argv)}"
    job.recorder.add("train", "plumb", 1e9 * found["per_iteration"] / found["ns"], "tok/s", command, raw=found)
    argv = [job.peers.scripts / "train_torch.py", job.peers.folder / "smollm2", "bf16", "4", "512"]
    job.peer("torch", argv, ("train", "torch", "tok/s", r"^torch bf16 train.*: ([\d.]+) tok/s"))


def train_memory(job):
    """Peak memory of two such steps, optimiser included"""
    words = "time year people way day man thing woman life child world school state family student group".split()
    some = lambda seed, step: " ".join(words[(i * step + seed) % len(words)] for i in range(255))  # noqa: E731
    pair = lambda i: {"prompt": some(i, 7) + " ", "chosen": some(i, 5), "rejected": some(i + 1, 3)}  # noqa: E731
    (job.folder / "pairs.jsonl").write_text("".join(json.dumps(pair(i)) + "\n" for i in range(8)))
    options = {
        "objective": "preference", "init": job.peers.folder / "smollm2", "train": job.folder / "pairs.jsonl",
        "output": tempfile.mkdtemp(dir=job.folder), "batch": 4, "language-weight": 0,
    }  # fmt: skip
    argv = [job.root / "target/release/plumb-train", "run", *(f"--{name}={value}" for name, value in options.items())]
    pattern = r"^peak: (\d+) MiB"
    lines, values = peers.figures(process.run([sys.executable, HERE / "peak.py", *argv]), pattern)
    job.recorder.add("train memory", "plumb", max(values), "MiB", shlex.join(map(str, argv)), raw=lines)
    argv = [HERE / "peak.py", job.peers.python("torch"), job.peers.scripts / "train_torch.py",
            job.peers.folder / "smollm2", "bf16", "4", "512"]  # fmt: skip
    job.peer("torch", argv, ("train memory", "torch", "MiB", pattern))


def items(job):
    """Throughput against the items of a call"""
    curve(job, "items", [(count, count, 256) for count in ITEMS])


def length(job):
    """Throughput against the length of sequences"""
    curve(job, "length", [(tokens, max(1, CALL_TOKENS // tokens), tokens) for tokens in LENGTHS])


def curve(job, work, points):
    """`points` are: where on the axis, items, tokens. All take about as long."""
    with job.server("pm") as server:
        for at, count, tokens in points[:2] if job.quick else points:
            requests = max(2, 3 * CALL_TOKENS // (count * tokens))
            sizes = ["--items", job.few(count), "--tokens", tokens, "--requests", job.few(requests)]
            words = ["--model", "pm", *sizes, "--concurrency", 1, "--warmup-secs", 1]
            job.bench(server, work, input_rate, "tok/s", "unique", *words, at=at)


def load(job):
    """Latency and answered calls against offered load"""
    sizes = ["--model", "pm", "--items", LOAD_ITEMS, "--tokens", LOAD_TOKENS]
    budget = QUEUED_CALLS * LOAD_ITEMS * LOAD_TOKENS
    with job.server("pm", flags=["--max-queue-tokens", budget]) as server:
        # As many calls as may be queued, all the time: the most that can be answered.
        closed = ["unique", *sizes, "--concurrency", QUEUED_CALLS, "--requests", job.few(40, 2)]
        report = job.bench(server, "capacity", sequence_rate, "seq/s", *closed, refusals=True)
        capacity = report["sequences_per_s"] / LOAD_ITEMS
        for percent in (50, 200) if job.quick else RATES:
            rate = round(capacity * percent / 100, 3)
            # Enough calls for a percentile, also where they come slowly.
            seconds = 2 if job.quick else max(12, math.ceil(30 / rate))
            words = ["unique", *sizes, "--rate", rate, "--arrivals", "poisson", "--duration-secs", seconds]
            offered = rate * LOAD_ITEMS
            # The last answer may come before the time is over.
            answered = lambda r, least=seconds: r["sequences"] / max(r["seconds"], least)  # noqa: E731
            job.bench(server, "load", answered, "seq/s", *words, at=percent, offered=offered, refusals=True)


def input_rate(report):
    return report["input_tokens_per_s"]


def sequence_rate(report):
    return report["sequences_per_s"]


def output_rate(report):
    return report["generation"]["new_tokens_per_s"]


def stream_rate(report):
    return report["generation"]["stream_tokens_per_s"]["p50"]


def latency(report):
    return report["latency_ms"]["p50"]


# Curves show a shape, not a ratio: the first round's do.
ONCE = ("items", "length", "load")
ALL = {f.__name__: f for f in (limits, score, text, single, decode, gguf, memory, train, train_memory, items, length, load)}
