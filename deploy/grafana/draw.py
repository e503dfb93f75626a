#!/usr/bin/env python3
"""Draws plumb.png: the dashboard's panels with what a real Prometheus answers of a real server under load.

    draw.py FOLDER

FOLDER has release builds of `plumb-server`, `plumb` and `plumb-train`. It takes four minutes: Score, Rank and Generate
all along, a second version of the preference model in the middle, and for a while more calls than the server takes.
Prometheus has to be installed, and what tests/benchmarks/requirements.txt names; nothing leaves this machine.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import pathlib
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request

import matplotlib

matplotlib.use("Agg")
from matplotlib import dates, pyplot  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402
from PIL import Image  # noqa: E402

HERE = pathlib.Path(__file__).parent
MODELS = HERE.parent.parent / "server/models"
STEP = 2
COLOURS = ["#73bf69", "#f2cc0c", "#8ab8ff", "#ff9830", "#f2495c", "#b877d9", "#5794f2", "#c0d8ff"]
GROUND, PANEL, LINE, TEXT, QUIET = "#111217", "#181b1f", "#2c3036", "#d8d9da", "#8e9299"
STYLE = {
    "font.size": 7,
    "text.color": TEXT,
    "axes.facecolor": PANEL,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def get(url):
    with urllib.request.urlopen(url, timeout=30) as answer:
        return json.load(answer)


def answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status == 200
    return False


def wait(what, is_there, seconds=120):
    until = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > until:
            raise SystemExit(f"never: {what}")
        time.sleep(0.2)


@contextlib.contextmanager
def running(command, log):
    """A process, which is ended with the block."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def observe(programs, folder):
    """Runs all of it; answers what the panels' queries answer, by query, and the times between which."""
    root = folder / "root"
    publish = [programs / "plumb-train", "publish"]
    subprocess.run([*publish, MODELS / "pm", root, "--name", "pm"], check=True, stdout=subprocess.DEVNULL)
    ports = folder / "ports.json"
    server = [programs / "plumb-server", "--port", "0", "--prometheus-port", "0", "--port-file", ports]
    server += ["--model", f"lm={MODELS / 'lm'}", "--model-root", root, "--kv-cache-mib", "64", "--threads", "1"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(server, folder / "server.log"))
        wait("ports", ports.exists)
        addresses = json.loads(ports.read_text())
        wait("the models", lambda: answers(f"http://{addresses['metrics']}/readyz"))
        prometheus = start_prometheus(folder, addresses["metrics"], stack)
        load(programs, f"http://{addresses['grpc']}", root, publish, folder)
        time.sleep(STEP * 2)
        end = time.time()
        return ask(prometheus, end - LENGTH, end), end - LENGTH, end


def start_prometheus(folder, target, stack):
    """Scrapes every other second; the rules are evaluated as often."""
    rules = re.sub(r"interval: .*", f"interval: {STEP}s", (HERE.parent / "prometheus/rules.yml").read_text())
    (folder / "rules.yml").write_text(rules)
    (folder / "prometheus.yml").write_text(
        f"global: {{ scrape_interval: {STEP}s, evaluation_interval: {STEP}s }}\n"
        "rule_files: [rules.yml]\n"
        f'scrape_configs: [{{ job_name: plumb, static_configs: [{{ targets: ["{target}"] }}] }}]\n'
    )
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    stack.enter_context(running([*command, f"--web.listen-address={address}"], folder / "prometheus.log"))
    url = f"http://{address}/api/v1/"

    def is_up():
        with contextlib.suppress(OSError, ValueError):
            return any(result["value"][1] == "1" for result in get(f"{url}query?query=up")["data"]["result"])
        return False

    wait("Prometheus scrapes", is_up)
    return url


# Seconds of the picture, and when things happen in them.
LENGTH, SWAP, OVERLOAD, CALM = 240, 90, 150, 185


def load(programs, server, root, publish, folder):
    """Traffic as a training loop and an evaluation make it."""

    def bench(name, *arguments, seconds=LENGTH):
        command = [programs / "plumb", "--server", server, "bench", *arguments, "--duration-secs", str(seconds)]
        return running([*command, "--warmup-secs", "0"], folder / f"{name}.log")

    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        stack.enter_context(bench("score", "unique", "--items", "4", "--tokens", "64", "--rate", "4"))
        stack.enter_context(bench("rank", "rank", "--candidates", "4", "--prompt-tokens", "96", "--tokens", "24",
                                  "--repeat-prompts", "--rate", "2"))  # fmt: skip
        stack.enter_context(bench("generate", "generate", "--new-tokens", "32", "--shared-prompt-tokens", "64",
                                  "--rate", "0.5"))  # fmt: skip
        time.sleep(max(0, begun + SWAP - time.monotonic()))
        subprocess.run(
            [*publish, other_version(folder / "other"), root, "--name", "pm"], check=True, stdout=subprocess.DEVNULL
        )
        time.sleep(max(0, begun + OVERLOAD - time.monotonic()))
        seconds = CALM - OVERLOAD
        with bench("overload", "unique", "--items", "32", "--tokens", "128", "--rate", "30", seconds=seconds):
            time.sleep(seconds)
        time.sleep(max(0, begun + LENGTH - time.monotonic()))


def other_version(folder):
    """The same model with half the rewards, as another training run might have them."""
    shutil.copytree(MODELS / "pm", folder)
    with open(folder / "model.safetensors", "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        head = json.loads(file.read(length))["score.weight"]
        begin, end = (8 + length + offset for offset in head["data_offsets"])
        file.seek(begin)
        # The upper half of an f32 is a bf16, and its exponent begins at bit 7.
        values = struct.unpack(f"<{(end - begin) // 2}H", file.read(end - begin))
        halves = [value - (1 << 7) if value & 0x7F80 else value for value in values]
        file.seek(begin)
        file.write(struct.pack(f"<{len(halves)}H", *halves))
    return folder


def ask(prometheus, begin, end):
    found = {}
    for panel in json.loads((HERE / "plumb.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$__rate_interval", "16s")
            expr = re.sub(r"\$(namespace|job|instance|model|version)", ".*", expr)
            values = {"query": expr, "start": begin, "end": end, "step": STEP}
            result = get(f"{prometheus}query_range?{urllib.parse.urlencode(values)}")["data"]["result"]
            found[target["expr"]] = [(series["metric"], series["values"]) for series in result]
    return found


def draw(observed, image):
    answers, begin, end = observed
    panels = [panel for panel in json.loads((HERE / "plumb.json").read_text())["panels"] if not panel.get("collapsed")]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    with matplotlib.rc_context(STYLE):
        width, height = 14, rows * 0.235
        figure = pyplot.figure(figsize=(width, height), facecolor=GROUND)
        for panel in panels:
            place = panel["gridPos"]
            left, top = place["x"] / 24, 1 - place["y"] / rows
            across, down = place["w"] / 24, place["h"] / rows
            if panel["type"] == "row":
                figure.text(left + 0.006, top - down * 0.75, panel["title"], fontsize=10, weight="bold")
                continue
            frame = (left + 0.003, top - down + 0.002, across - 0.006, down - 0.004)
            figure.add_artist(
                pyplot.Rectangle(frame[:2], *frame[2:], facecolor=PANEL, edgecolor=LINE, lw=0.6, zorder=-1)
            )
            figure.text(left + 0.009, top - 0.15 / height, panel["title"], fontsize=8, weight="bold", va="top")
            if panel["type"] == "stat":
                draw_stat(figure, panel, answers, left + across / 2, top - down * 0.62)
                continue
            space = figure.add_axes(
                (left + 0.62 / width, top - down + 0.62 / height, across - 0.76 / width, down - 1.04 / height)
            )
            DRAW[panel["type"]](space, panel, answers)
            space.set_xlim(when(begin), when(end))
            space.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
            space.xaxis.set_major_locator(dates.MinuteLocator())
            space.spines[["top", "right"]].set_visible(False)
        figure.savefig(image, dpi=110, facecolor=GROUND)
    pyplot.close(figure)
    # As many colours as a dashboard has, in a third of the bytes.
    Image.open(image).convert("RGB").quantize(96).save(image, optimize=True)


def when(second):
    return datetime.datetime.fromtimestamp(float(second), datetime.UTC)


def series(panel, answers):
    """Name, times and values of every line."""
    for target in panel["targets"]:
        for metric, values in answers[target["expr"]]:
            name = target["legendFormat"]
            for label in re.findall(r"{{(\w+)}}", name):
                name = name.replace(f"{{{{{label}}}}}", metric.get(label, ""))
            points = [(when(at), float(value)) for at, value in values if value not in ("NaN", "+Inf", "-Inf")]
            if points:
                yield name, *zip(*points, strict=True)


def draw_lines(space, panel, answers):
    lines = list(series(panel, answers))
    for (name, times, values), colour in zip(lines, COLOURS * 3, strict=False):
        space.plot(times, values, color=colour, lw=1, label=name)
        space.fill_between(times, values, color=colour, alpha=0.06, lw=0)
    if panel["fieldConfig"]["defaults"].get("min") == 0:
        space.set_ylim(bottom=0, top=None if any(max(values) > 0 for _, _, values in lines) else 1)
    space.yaxis.set_major_formatter(lambda value, _: short(value, panel["fieldConfig"]["defaults"]["unit"]))
    space.yaxis.set_major_locator(pyplot.MaxNLocator(5))
    if lines:
        columns = 2 if len(lines) > 3 else len(lines)
        space.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.2), ncols=columns, fontsize=6, handlelength=1,
                     columnspacing=1, labelspacing=0.15, borderpad=0)  # fmt: skip
    else:
        space.text(0.5, 0.5, "No data", transform=space.transAxes, ha="center", color=QUIET)


def draw_stat(figure, panel, answers, x, y):
    defaults = panel["fieldConfig"]["defaults"]
    (_, _, values), *_ = series(panel, answers)
    mapped = {float(key): value for key, value in (defaults.get("mappings") or [{"options": {}}])[0]["options"].items()}
    state = mapped.get(values[-1])
    text = state["text"] if state else short(values[-1], defaults["unit"])
    figure.text(x, y, text, fontsize=17, ha="center", va="center", color=COLOURS[0] if state else TEXT)


def draw_states(space, panel, answers):
    options = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
    names = {"green": "#56a64b", "red": "#e02f44", "yellow": "#e5b400", "orange": "#e36d1f", "text": "#565b63"}
    lines = sorted(series(panel, answers), reverse=True)
    for y, (_, times, values) in enumerate(lines):
        begin = 0
        for at in range(1, len(values) + 1):
            if at < len(values) and values[at] == values[begin]:
                continue
            last = times[min(at, len(values) - 1)]
            option = options[str(int(values[begin]))]
            space.barh(y, last - times[begin], left=times[begin], height=0.8, color=names[option["color"]])
            if (last - times[begin]).total_seconds() > 30:
                space.text(times[begin] + (last - times[begin]) / 2, y, option["text"], ha="center", va="center")
            begin = at
    space.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    space.grid(visible=False)


def draw_heatmap(space, panel, answers):
    (target,) = panel["targets"]
    buckets = {float(metric["le"]): dict(values) for metric, values in answers[target["expr"]]}
    bounds = sorted(buckets)
    times = sorted({at for values in buckets.values() for at in values})
    cumulative = [[float(buckets[bound].get(at, 0)) for at in times] for bound in bounds]
    counts = [[max(0, b - a) for a, b in zip(low, high, strict=True)] for low, high in itertools.pairwise(cumulative)]
    used = [at for at, row in enumerate(counts) if any(value > 0.5 for value in row)]
    low, high = max(0, min(used) - 1), min(len(counts), max(used) + 2)
    colours = ListedColormap([PANEL, *pyplot.get_cmap("Blues")([x / 20 for x in range(4, 19)])])
    space.pcolormesh(
        [when(at) for at in times], range(low, high + 1), [row[:-1] for row in counts[low:high]], cmap=colours
    )
    labelled = range(low, high + 1, 1 + (high - low) // 8)
    space.set_yticks(labelled, [f"{bounds[at]:g}" for at in labelled])
    space.grid(visible=False)


DRAW = {"timeseries": draw_lines, "state-timeline": draw_states, "heatmap": draw_heatmap}


def short(value, unit):
    if unit == "percentunit":
        return f"{100 * value:g} %"
    if unit == "s":
        return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"
    for size, letter in ((1 << 30, "GiB"), (1 << 20, "MiB")) if unit == "bytes" else ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}" + {"reqps": " /s"}.get(unit, "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("programs", type=pathlib.Path, help="folder of plumb-server, plumb and plumb-train")
    parser.add_argument("--image", type=pathlib.Path, default=HERE / "plumb.png")
    parser.add_argument("--observed", type=pathlib.Path, help="file for the answers; if it is there, only draw them")
    options = parser.parse_args()
    if not options.observed or not options.observed.exists():
        if not shutil.which("prometheus"):
            raise SystemExit("there is no prometheus")
        with tempfile.TemporaryDirectory() as folder:
            observed = observe(options.programs, pathlib.Path(folder))
        if options.observed:
            options.observed.write_text(json.dumps(observed))
    else:
        observed = json.loads(options.observed.read_text())
    draw(observed, options.image)


if __name__ == "__main__":
    main()
