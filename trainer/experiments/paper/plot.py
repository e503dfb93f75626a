"""Draws paper.json as prompt.svg, pretraining.svg and reranking.svg. The same numbers give the same bytes.

Needs matplotlib: pip install -r tests/benchmarks/requirements.txt
"""

import json
import pathlib
import re

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import NullLocator

HERE = pathlib.Path(__file__).resolve().parent
STYLE = HERE.parent / "plots.mplstyle"
BENCHMARKS = HERE.parents[2] / "BENCHMARKS.md"
BLUE, LIGHT, ORANGE, GREY = "#1f6fb5", "#62a3d9", "#d2691e", "#555555"
# SmolLM2-135M without its embeddings, 49,152 tokens of 576 numbers, as the paper counts.
SMOLLM2 = 134_515_008 - 49_152 * 576


def main():
    numbers = json.loads((HERE / "paper.json").read_text())
    with matplotlib.rc_context(fname=STYLE):
        for name, draw in (("prompt", prompt), ("pretraining", pretraining), ("reranking", reranking)):
            figure, axes = pyplot.subplots(ncols=2, figsize=(8.4, 4.1))
            draw(numbers[name], numbers["sizes"], figure, axes)
            figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


def prompt(numbers, sizes, figure, axes):
    """What the HHH prompt gives to the left, what it takes to the right."""
    styles = {
        "none": ("no prompt", {"color": GREY, "linestyle": ":", "marker": "D"}),
        "prompt": ("HHH prompt", {"color": BLUE, "linestyle": "-", "marker": "o"}),
        "distilled": ("distilled from the prompt", {"color": ORANGE, "linestyle": "--", "marker": "s"}),
    }
    for ax, data in zip(axes, ("comparisons", "lambada"), strict=True):
        for name, (label, style) in styles.items():
            ax.plot(sizes.values(), numbers[data][name], label=label, markersize=4, **style)
        by_size(ax, sizes)
    # A little to both sides, so that both intervals can be seen.
    for name, (value, low, high), aside in zip(("none", "prompt"), measured(), (0.9, 1.1), strict=True):
        style = {**styles[name][1], "linestyle": "", "markersize": 7, "capsize": 3}
        axes[0].errorbar([SMOLLM2 * aside], [value], [[value - low], [high - value]], **style)
    axes[0].axhline(0.5, color="#888888", linewidth=1)
    axes[0].annotate("chance", (52e9, 0.5), (0, 3), textcoords="offset points", ha="right", color=GREY, fontsize=9)
    axes[0].set_title("HHH comparisons (figures 2 and 20)", fontsize=10)
    axes[0].set_ylabel("share with the better response ahead")
    axes[1].set_title("LAMBADA (figure 7)", fontsize=10)
    axes[1].set_ylabel("share with the last word right")
    title = "lines: Askell et al. 2021; single marks: SmolLM2-135M, here, with 95 % intervals"
    legend = {"title": title, "title_fontsize": 9, "ncols": 3}
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", **legend)


def measured():
    """SmolLM2-135M without and with the prompt: share, and both ends of its 95 % interval."""
    row = next(line for line in BENCHMARKS.read_text().splitlines() if re.match(r"\| all +\| 112 ", line))
    found = re.findall(r"([\d.]+) \(([\d.]+) to ([\d.]+)\)", row)
    return [[float(percent) / 100 for percent in cell] for cell in found]


def pretraining(numbers, sizes, figure, axes):
    """Gain by fine-tuning pairs at the largest size to the left; with and without, by size, to the right."""
    gain, size = axes
    styles = {
        "all three": {"color": BLUE, "marker": "o", "linewidth": 2},
        "Stack Exchange": {"color": ORANGE, "marker": "s", "linestyle": "--"},
        "Reddit": {"color": GREY, "marker": "^", "linestyle": "-."},
        "Wikipedia": {"color": LIGHT, "marker": "D", "linestyle": ":"},
    }
    for name, style in styles.items():
        points = [100 * share for share in numbers["gain"][name]]
        gain.plot(numbers["gain"]["pairs"], points, label=name, markersize=4, **style)
    gain.set_xscale("log")
    gain.set_xticks(numbers["gain"]["pairs"], ["100", "200", "500", "1k", "2k", "5k", "10k", "20k"], fontsize=9)
    gain.xaxis.set_minor_locator(NullLocator())
    gain.set_ylim(bottom=0)
    gain.set_xlabel("fine-tuning pairs")
    gain.set_ylabel("gain in mean accuracy, percentage points")
    gain.set_title("Askell et al. 2021, figure 4: 52B parameters", fontsize=10)
    gain.legend(title="pretraining on", loc="upper right")
    for pairs, mark, line in (("5000", "o", "-"), ("500", "s", "--")):
        for name, colour, label in (("all three", BLUE, "pretrained"), ("none", GREY, "not")):
            style = {"color": colour, "marker": mark, "markersize": 4, "linestyle": line}
            size.plot(sizes.values(), numbers["size"][pairs][name], label=f"{int(pairs):,} pairs, {label}", **style)
    by_size(size, sizes)
    size.set_ylim(0.2, 0.8)
    size.set_ylabel("mean accuracy of 7 sets")
    size.set_title("figures 5 and 16: pretrained on all three, or not", fontsize=10)
    size.legend(loc="upper left")


def reranking(numbers, _, figure, axes):
    """Top-1 accuracy of k samples for a small and a large model."""
    styles = {
        "oracle": ("any of the k is correct", {"color": GREY, "linestyle": ":", "marker": "D"}),
        "preference": ("preference model", {"color": BLUE, "linestyle": "-", "marker": "o"}),
        "imitation": ("imitation", {"color": ORANGE, "linestyle": "--", "marker": "s"}),
    }
    for ax, size in zip(axes, ("197M", "13B"), strict=True):
        for name, (label, style) in styles.items():
            ax.plot(numbers["k"], numbers[size][name], label=label, markersize=4, **style)
        ax.set_xscale("log")
        ax.set_xticks(numbers["k"], [str(k) for k in numbers["k"]])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_ylim(0.2, 0.9)
        ax.set_xlabel("samples per problem, k")
        ax.set_title(f"{size} parameters", fontsize=10)
    axes[0].set_ylabel("share with a correct program chosen")
    legend = {"title": "Python functions: Askell et al. 2021, figures 11 and 12", "title_fontsize": 9, "ncols": 3}
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", **legend)


def by_size(ax, sizes):
    ax.set_xscale("log")
    ax.set_xticks(list(sizes.values()), list(sizes), fontsize=9)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("parameters, without embeddings")


if __name__ == "__main__":
    main()
