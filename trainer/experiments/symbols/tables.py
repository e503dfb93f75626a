"""Turns results into the tables of README.md: accuracies beside the paper's, and how often they are in its order."""

import json
import pathlib
import statistics

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# Read off the paper's figure 33, with an error of about 0.002.
PAPER = json.loads((pathlib.Path(__file__).parent / "paper.json").read_text())
TITLES = {
    "T1": "T1, 10 transpositions",
    "T2": "T2, 40",
    "T3": "T3, 160",
    "binary": "binary",
    "none": "none",
    "T4": "T4, 640",
    "unrelated": "unrelated ranking",
}
COUNTS = [int(pairs) for pairs in PAPER["none"]]
# What the paper's figure says of few pairs: (more, less).
CLAIMS = (("T1", "T2"), ("T2", "T3"), ("T2", "binary"), ("T3", "none"), ("binary", "none"), ("none", "T4"))
FEW = 2000


def render(results, path):
    """Puts the tables between the marks in a file."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{path} lacks the marks {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{accuracies(results)}\n{order(results)}\n{END}{after}")


def accuracies(results):
    """For every pretraining set a row of means, one of ranges, and one of the paper's figures."""
    rows = [["pretraining on", "", "shared", "0", *(f"{pairs:,}" for pairs in COUNTS)]]
    for name, title in TITLES.items():
        share = statistics.mean(curve["shared"] for curve in of(results, name))
        found = values(results, name)
        points = [found.get(pairs) for pairs in (0, *COUNTS)]
        rows.append([title, "here", f"{share:.3f}", *(f"**{statistics.mean(p):.3f}**" if p else "" for p in points)])
        rows.append(["", "range", "", *(f"{min(p):.2f} to {max(p):.2f}" if p else "" for p in points)])
        if name in PAPER:
            rows.append(["", "paper", "", "", *(f"{PAPER[name][str(pairs)]:.3f}" for pairs in COUNTS)])
    return table(rows)


def order(results):
    """For every claim, how often it holds, and by how much on average."""
    rows = [["below 2,000 pairs", "paper: mean difference", "here: mean difference", "here: holds"]]
    counts = [pairs for pairs in COUNTS if pairs < FEW]
    for more, less in CLAIMS:
        paper = statistics.mean(PAPER[more][str(pairs)] - PAPER[less][str(pairs)] for pairs in counts)
        better, worse = values(results, more), values(results, less)
        # The curves of a seed share ranking and test pairs.
        ours = [a - b for pairs in counts for a, b in zip(better[pairs], worse[pairs], strict=True)]
        holds = sum(difference > 0 for difference in ours)
        rows.append([f"{more} above {less}", f"{paper:+.3f}", f"{statistics.mean(ours):+.3f}",
                     f"{holds} of {len(ours)}"])  # fmt: skip
    return table(rows)


def values(results, name):
    """Accuracies of all seeds by the number of pairs."""
    found = {}
    for curve in of(results, name):
        for point in curve["points"]:
            found.setdefault(point["pairs"], []).append(point["accuracy"])
    return found


def of(results, name):
    return [curve for curve in results["curves"] if curve["pretraining"] == name]


def table(rows):
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
