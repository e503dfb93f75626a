"""Turns results into the tables of BENCHMARKS.md: ratios of the same round, their median, and whether a bar is met."""

import collections
import dataclasses
import json
import os
import statistics
from collections.abc import Callable

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# Floating-point operations for a token: two for each of the 106.2 million weights outside of the embedding.
GFLOP_PER_TOKEN = 0.212
# What a new token reads at least: all weights, in bf16.
WEIGHTS_GB = 0.269


@dataclasses.dataclass
class Row:
    """A comparison. The functions take a round's values by (work, who, at), and raise KeyError for missing ones."""

    work: str
    unit: str
    beside: str
    ours: Callable
    theirs: Callable
    bar: float | None = None
    at_most: bool = False


def of(work, who="plumb", at=None):
    return lambda values: values[work, who, at]


def beside(work, name, unit, peers):
    """A row for each peer that a work is compared with: name in the results, title, bar."""
    return [Row(name, unit, title, of(work), of(work, peer), bar) for peer, title, bar in peers]


def vllm(bar=None):
    """vLLM as it comes, for which bars are set, and told to use every core."""
    return [("vllm", "vLLM", bar), ("vllm, all cores", "vLLM on all cores", None)]


PEERS = [
    *beside("unique", "score 32 unique sequences of 256 tokens", "tok/s",
            [*vllm(2.3), ("torch bf16", "Transformers, bf16", 1.45), ("torch f32", "Transformers, f32", None)]),
    *beside("rank", "rank 8 candidates of 64 tokens behind 512 shared ones, 4 calls at a time", "seq/s",
            vllm(2.5)),
    *beside("text", "score real dialogues of mixed lengths, 32 a call", "tok/s",
            [*vllm(2.3), ("torch", "Transformers, bf16", 3.0)]),
    *beside("decode 1", "generate, one stream", "tok/s", vllm()),
    *beside("decode 16", "generate, 16 streams", "tok/s", vllm(2.0)),
    *beside("decode 16 shared", "generate, 16 streams behind 6,000 shared tokens", "tok/s", vllm(2.0)),
    *beside("gguf prefill", "GGUF Q4_1: a prompt of 512 tokens", "tok/s", [("llama", "llama.cpp", 4.0)]),
    *beside("gguf decode", "GGUF Q4_1: generate, one stream", "tok/s", [("llama", "llama.cpp", 1.0)]),
    *beside("train", "train on 4 pairs of 512 tokens, the first half of each pair shared", "tok/s",
            [("torch", "PyTorch, bf16 autocast", 1.5)]),
    Row("most resident memory in two such steps, from reading to the optimiser", "MiB", "PyTorch, bf16 autocast",
        of("train memory"), of("train memory", "torch"), 1.0, at_most=True),
]  # fmt: skip


def flops(values):
    return values["unique", "plumb", None] * GFLOP_PER_TOKEN


LIMITS = [
    Row("score 32 unique sequences of 256 tokens", "GFLOP/s", "a loop of bf16 matrix products",
        flops, of("limits", "bf16 matrix loop"), 0.75),
    Row("generate, one stream, after the first token", "tok/s", "sequential reads of the weights",
        of("decode 1", "plumb, after the first token"), lambda v: v["limits", "reads", None] / WEIGHTS_GB, 0.85),
    Row("one request of 300 tokens on an idle server, p50", "ms", "the forward pass alone",
        of("single"), of("single", "forward pass"), 1.1, at_most=True),
    Row("resident memory with the cache full", "MiB", "weights and a cache of 256 MiB",
        of("memory"), of("memory", "weights and cache"), 1.15, at_most=True),
    Row("answered when twice the capacity is offered", "seq/s", "answered when just the capacity is",
        of("load", at=200), of("load", at=100), 1.0),
]  # fmt: skip
HEAD = "| work | Plumb | beside | its figure | ratio | bar | met |\n|---|---|---|---|---|---|---|\n"


def load(path):
    return json.loads(path.read_text())


def write(results, page, source):
    """Replaces what stands between the markers of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{page} lacks the markers {BEGIN} and {END}")
    body = text(results, os.path.relpath(source, page.parent), plots=True)
    page.write_text(f"{before}{BEGIN}\n\n{body}\n{END}{after}")


def text(results, source=None, plots=False):
    """The tables and what one has to know about them; with links to the raw values and the plots if they are there."""
    parts = [about(results, source)]
    rounds = values_of(results)
    for title, rows in (("### Beside other software", PEERS), ("### Beside what the machine can do", LIMITS)):
        lines = [line for line in (table_row(row, rounds) for row in rows) if line]
        if lines:
            parts.append(f"{title}\n\n{HEAD}{''.join(lines)}")
    parts.append(NOTES)
    return "\n".join(parts + [PLOTS] * plots)


def values_of(results):
    """For each round, values by work, name and place on an axis."""
    rounds = collections.defaultdict(dict)
    for record in results["records"]:
        rounds[record["round"]][record["work"], record["who"], record.get("at")] = record["value"]
    return list(rounds.values())


def about(results, source):
    versions = results["versions"]
    peers = [", ".join(map(" ".join, found.items())) for found in versions.values()]
    rounds, changed = results["rounds"], ", with changes," if results["changed"] else ""
    lines = [
        f"{results['date'][:10]}, revision {results['revision'][:12]}{changed} built by {results['compiler']},"
        f" on {results['cpu']}, {results['cores']} cores, {results['memory_gib']:.0f} GiB."
    ]
    added = results.get("added", [])
    whole = rounds - sum(more["rounds"] for more in added)
    lines.append(f"Rounds: {whole}, each of which took all figures one after the other.")
    for more in added:
        what = f"of {', '.join(more['only'])}" if more["only"] else "of everything"
        lines.append(f"Then {more['rounds']} more {what}, to see how far the figures scatter.")
    lines.append("Figures are medians over rounds; ratios are those of the same round: median (smallest to largest).")
    lines.append(f"Beside Plumb: {'; '.join(peers) or 'nothing'}.")
    if results["left_out"]:
        lines.append(f"Left out: {'; '.join(results['left_out'])}.")
    if results["quick"]:
        lines.append("Sizes were tiny, to try the script: the figures mean nothing.")
    if max(results["busy"], default=0) > 0.1:
        lines.append(f"The machine was not quiet: {max(results['busy']):.0%} of the cores were busy before a round.")
    if source:
        lines.append(f"Every value of every round, with its command: [{os.path.basename(source)}]({source}).")
    return "\n".join(lines) + "\n"


def table_row(row, rounds):
    pairs = []
    for values in rounds:
        try:
            pairs.append((row.ours(values), row.theirs(values)))
        except KeyError:
            continue
    if not pairs:
        return None
    ours, theirs = (statistics.median(column) for column in zip(*pairs))
    ratios = [mine / other for mine, other in pairs]
    ratio = statistics.median(ratios)
    digits = 3 if row.at_most else 2
    spread = f" ({min(ratios):.{digits}f} to {max(ratios):.{digits}f})" if len(ratios) > 1 else ""
    cells = [row.work, f"{number(ours)} {row.unit}", row.beside, f"{number(theirs)} {row.unit}"]
    return f"| {' | '.join([*cells, f'{ratio:.{digits}f}{spread}', *verdict(row, ratio)])} |\n"


def verdict(row, ratio):
    if row.bar is None:
        return ["", ""]
    met = ratio <= row.bar if row.at_most else ratio >= row.bar
    return [f"{'at most' if row.at_most else 'at least'} {row.bar:g}", "yes" if met else "no"]


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


NOTES = """\
All models are SmolLM2-135M, in bf16 where nothing else is said.
Plumb answers over gRPC, everything included; its figure is that of all calls together.
Other software is called in its own process; its figure is the best of the passes that its script times.
Plumb and vLLM score 32 sequences in a call, Transformers 8 in a batch.
vLLM as it comes leaves one core to its scheduler; on all cores it was timed in the first round only.
Real dialogues reach Plumb as text, other software as tokens: the same ones, each text once.
What the two sides of a pair share may be reused, by vLLM as by Plumb.
How fast a process reads its memory depends on where the system puts it: reads and the stream beside them are medians of five processes each.
One GGUF stream is timed after its first token, at the median.
"""

PLOTS = """\
### Throughput and latency

Measured in the first round.

![Tokens scored in a second, by the number of items of 256 tokens in a call](tests/benchmarks/plots/items.svg)

![Tokens scored in a second, by the length of sequences in calls of about 8,192](tests/benchmarks/plots/length.svg)

Offered load is a Poisson process of calls with 4 items of 256 tokens; the server queues 8 such calls and refuses more.

![Latency and answered sequences by offered load](tests/benchmarks/plots/load.svg)
"""
