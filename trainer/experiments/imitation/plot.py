"""Draws results/ among the paper's models of all sizes, as results.svg. The same results give the same bytes.

Needs matplotlib: pip install -r tests/benchmarks/requirements.txt
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

HERE = pathlib.Path(__file__).resolve().parent
STYLE = HERE.parent / "plots.mplstyle"
# Set, title, and what guessing reaches where items are independent.
PANELS = [
    ("hellaswag", "ranked: HellaSwag, right of four", 1 / 4),
    ("justice", "binary: Justice, groups of four", 1 / 16),
]
# Model, name, line of the paper's; colour, mark of ours, and how far to the side it is drawn, so that all can be seen.
MODELS = [
    ("preference", "preference model", "-", "#1f6fb5", "o", 1),
    ("imitation", "imitation", "--", "#d2691e", "s", 1.22),
    ("untrained", "not trained", "", "#555555", "D", 1 / 1.22),
]
# The paper counts no embeddings; SmolLM2's are 49,152 tokens of 576 numbers.
EMBEDDINGS = 49_152 * 576


def main():
    paper = json.loads((HERE / "paper.json").read_text())
    sizes = paper["sizes"]
    with matplotlib.rc_context(fname=STYLE):
        figure, axes = pyplot.subplots(ncols=2, sharey=True, figsize=(8.4, 4.3))
        for ax, (data, title, chance) in zip(axes, PANELS, strict=True):
            for model, _, line, colour, mark, aside in MODELS:
                if model in paper[data]:
                    ax.plot(sizes.values(), paper[data][model], color=colour, linestyle=line, marker=".")
                size, value, interval = measured(data, paper[data]["metric"], model)
                ax.errorbar([size * aside], [value], interval, color=colour, marker=mark, markersize=6, capsize=3)
            ax.axhline(chance, color="#888888", linestyle=":")
            ax.set_title(title, fontsize=10)
            ax.set_xscale("log")
            ax.set_xticks(list(sizes.values()), list(sizes), fontsize=9)
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel("parameters, without embeddings")
        axes[0].set_ylim(-0.02, 1)
        axes[0].set_ylabel("accuracy on held-out items")
        entries = [Line2D([], [], linestyle=line, color=colour, marker=mark, label=name)
                   for _, name, line, colour, mark, _ in MODELS]  # fmt: skip
        entries.append(Line2D([], [], linestyle=":", color="#888888", label="chance"))
        title = "lines: Askell et al. 2021, figures 14 and 15; single marks: SmolLM2-135M, here, with 95 % intervals"
        figure.legend(handles=entries, title=title, title_fontsize=9, ncols=len(entries), loc="outside lower center")
        figure.savefig(HERE / "results.svg", metadata={"Date": None})


def measured(data, metric, model):
    """Parameters without embeddings, accuracy on the standard test set, and how far its interval goes down and up."""
    results = json.loads((HERE / "results" / f"{data}-{model}" / "results.json").read_text())
    found = next(found for found in results["results"] if found["metric"] == metric)
    interval = [[found["value"] - found["low"]], [found["high"] - found["value"]]]
    return results["model"]["parameters"] - EMBEDDINGS, found["value"], interval


if __name__ == "__main__":
    main()
