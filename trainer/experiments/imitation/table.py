"""Writes the table of README.md from results/."""

import json
import pathlib

HERE = pathlib.Path(__file__).parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
MODELS = {"untrained": "not trained", "imitation": "imitation", "preference": "preference model"}
# Set, file, metric, and the paper's models of 42M, 197M and 810M (figures 14 and 15).
ROWS = [
    ("hellaswag", "accuracy", "HellaSwag, right of four", {"imitation": ".292 .373 .513", "preference": ".355 .490 .737"}),
    ("justice", "group accuracy", "Justice, groups of four", {"imitation": ".219 .283 .408", "preference": ".218 .290 .403"}),
    ("justice", "accuracy", "Justice, each", {}),
]


def read(data, model):
    path = HERE / "results" / f"{data}-{model}" / "results.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


def main():
    lines = ["| set | | accuracy | 95 % interval | n | the paper's 42M, 197M, 810M |", "|---|---|---|---|---|---|"]
    for data, metric, title, paper in ROWS:
        for model, name in MODELS.items():
            for found in read(data, model):
                if found["metric"] != metric or found["name"] == "all":
                    continue
                hard = ", hard test set" if "hard" in found["name"] else ""
                beside = "" if hard else paper.get(model, "")
                interval = f"{found['low']:.3f} to {found['high']:.3f}"
                lines.append(f"| {title}{hard} | {name} | {found['value']:.3f} | {interval} | {found['n']} | {beside} |")
    page = HERE / "README.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


main()
