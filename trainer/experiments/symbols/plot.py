"""Draws results.json as results.svg, with the paper's curves beside it. The same results give the same bytes.

Needs matplotlib: pip install -r tests/benchmarks/requirements.txt
"""

import json
import pathlib
import statistics

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: E402

import tables  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent
STYLE = HERE.parent / "plots.mplstyle"
# The scrambled rankings from dark to light.
COLOURS = {
    "T1": "#0b3c6f",
    "T2": "#1f6fb5",
    "T3": "#62a3d9",
    "T4": "#a9cdea",
    "binary": "#d2691e",
    "none": "#555555",
    "unrelated": "#aaaaaa",
}
LINES = {"none": "--", "unrelated": ":"}
TICKS = {100: "100", 200: "200", 500: "500", 1000: "1k", 2000: "2k", 5000: "5k", 10000: "10k", 18000: "18k"}


def main():
    results = json.loads((HERE / "results.json").read_text())
    with matplotlib.rc_context(fname=STYLE):
        figure, (ours, paper) = pyplot.subplots(ncols=2, sharey=True, figsize=(9.6, 4.2))
        for name, colour in COLOURS.items():
            found = tables.values(results, name)
            style = {"color": colour, "markersize": 4, "linestyle": LINES.get(name, "-"), "marker": "o"}
            points = [found[pairs] for pairs in tables.COUNTS]
            ours.plot(tables.COUNTS, [statistics.mean(point) for point in points], label=name, **style)
            low, high = zip(*((min(point), max(point)) for point in points), strict=True)
            ours.fill_between(tables.COUNTS, low, high, color=colour, alpha=0.18, linewidth=0)
            if name in tables.PAPER:
                paper.plot(tables.COUNTS, [tables.PAPER[name][str(pairs)] for pairs in tables.COUNTS], **style)
        seeds = len({curve["seed"] for curve in results["curves"]})
        ours.set_title(f"3.1M parameters, mean and range of {seeds} seeds", fontsize=10)
        paper.set_title("13B parameters (Askell et al. 2021, figure 33)", fontsize=10)
        ours.set_ylabel("accuracy on held-out pairs")
        for ax in (ours, paper):
            ax.set_xscale("log")
            ax.set_xticks(list(TICKS))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda pairs, _: TICKS.get(round(pairs), "")))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("fine-tuning pairs of T0")
        figure.legend(title="pretraining on", loc="outside right center")
        figure.savefig(HERE / "results.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
