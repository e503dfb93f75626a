"""Writes the table of README.md from results/."""

import json
import pathlib

HERE = pathlib.Path(__file__).parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MODELS = {"untrained": "not trained", "imitation": "imitation", "preference": "preference model"}
# Set, metric, title.
ROWS = [
    ("hellaswag", "accuracy", "HellaSwag, right of four"),
    ("justice", "group accuracy", "Justice, groups of four"),
    ("justice", "accuracy", "Justice, each"),
]
# The paper's models nearest to ours.
SIZES = ("42M", "197M", "810M")


def read(data, model):
    path = HERE / "results" / f"{data}-{model}" / "results.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def main():
    paper = json.loads((HERE / "paper.json").read_text())
    lines = ["| set | | accuracy | 95 % interval | n | the paper's 42M, 197M, 810M |", "|---|---|---|---|---|---|"]
    for data, metric, title in ROWS:
        for model, name in MODELS.items():
            for found in read(data, model):
                if found["metric"] != metric or found["name"] == "all":
                    continue
                hard = ", hard test set" if "hard" in found["name"] else ""
                curve = paper[data].get(model) if metric == paper[data]["metric"] and not hard else None
                theirs = dict(zip(paper["sizes"], curve, strict=True)) if curve else {}
                beside = " ".join(f"{theirs[size]:.3f}".lstrip("0") for size in SIZES if size in theirs)
                value = f"{found['value']:.3f} | {found['low']:.3f} to {found['high']:.3f} | {found['n']}"
                lines.append(f"| {title}{hard} | {name} | {value} | {beside} |")
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


main()
