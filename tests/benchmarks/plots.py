"""Draws results as SVG. The same results give the same bytes: no dates, ids from a fixed salt, versions pinned."""

import collections
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

STYLE = {
    "svg.hashsalt": "plumb",
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
BLUE, ORANGE, GREY = "#1f5fa8", "#d2691e", "#777777"
SIZE = (6.4, 3.4)


def draw(results, folder):
    """Draws what was measured; answers the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = {"items": "items of 256 tokens in a call", "length": "tokens in a sequence (about 8,192 in a call)"}
    figures = {work: lambda work=work, axis=axis: throughput(results, work, axis) for work, axis in axes.items()}
    figures["load"] = lambda: load(results)
    measured = {record["work"] for record in results["records"]}
    with matplotlib.rc_context(STYLE):
        return [save(make(), folder / f"{name}.svg") for name, make in figures.items() if name in measured]


def save(figure, path):
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    pyplot.close(figure)
    return path


def throughput(results, work, axis):
    """Tokens/s against powers of two."""
    figure, ax = pyplot.subplots(figsize=SIZE)
    points = series(results, work, lambda record: record["value"])
    ax.set_xscale("log", base=2)
    line(ax, points, BLUE)
    ax.set_xticks([x for x, _ in points])
    plain(ax.xaxis)
    plain(ax.yaxis)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(axis)
    ax.set_ylabel("tokens scored in a second")
    return figure


def load(results):
    """Latency above, answers below, on the same axis of offered load."""
    figure, (above, below) = pyplot.subplots(2, sharex=True, figsize=(SIZE[0], 5.2))
    for name, colour in (("p50", BLUE), ("p99", ORANGE)):
        points = series(results, "load", lambda record, name=name: (record["raw"]["latency_ms"] or {}).get(name))
        line(above, points, colour, name)
    above.set_yscale("log")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plain(above.yaxis)
    above.set_ylabel("latency of answered calls, ms")
    above.legend(loc="upper left")
    line(below, series(results, "load", lambda record: record["value"]), BLUE, "answered")
    capacity = statistics.median(record["value"] for record in results["records"] if record["work"] == "capacity")
    below.axhline(capacity, color=GREY, linestyle=":", label="capacity, closed loop")
    below.plot([0, 100], [0, capacity], color=GREY, linestyle="--", linewidth=1, label="offered")
    below.set_ylim(bottom=0)
    below.set_xlim(left=0)
    plain(below.yaxis)
    below.set_ylabel("answered, sequences/s")
    below.set_xlabel("offered load, % of capacity")
    below.legend(loc="lower right")
    return figure


def series(results, work, value):
    """(place on the axis, values of all rounds), in order."""
    points = collections.defaultdict(list)
    for record in results["records"]:
        if record["work"] == work and (found := value(record)) is not None:
            points[record["at"]].append(found)
    return sorted(points.items())


def line(ax, points, colour, label=None):
    places = [place for place, _ in points]
    ax.plot(places, [statistics.median(values) for _, values in points], "o-", color=colour, markersize=4, label=label)
    ax.fill_between(places, *zip(*((min(v), max(v)) for _, v in points)), color=colour, alpha=0.18, linewidth=0)


def plain(axis):
    """Numbers as they are read, and no ticks between them."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())
