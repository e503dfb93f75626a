"""Runs the symbol experiment: pretraining on each set, then fine-tuning on T0, for every seed.

Needs Python 3.11 or newer, and `plumb-train`. What is done is not done again, and a run that was interrupted goes on.
At the end results.json holds the figures of the seeds that were named, and README.md the tables.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tomllib

import data
import tables

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MODEL = ROOT / "server/models/lm"
RECIPE = HERE / "recipe.toml"
OPTIONS = tomllib.loads(RECIPE.read_text())
BATCH = OPTIONS["batch"]
# The first two suffice to see whether something is wrong. The last is not in the paper.
CONDITIONS = ("none", "T1", "binary", "T2", "T3", "T4", "unrelated")
# Fine-tuning up to so many pairs, measured every so many. A shorter run is the beginning of the longer ones.
STRETCHES = ((500, 100), (2000, 1000), (data.FINETUNING_PAIRS, 5000))


def main():
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    settings = describe()
    keep(options.work / "settings.json", json.dumps(settings, indent=1) + "\n")
    experiment = Experiment(options.work, program(options), options.threads)
    curves = []
    for seed in options.seeds:
        shared = experiment.write_data(seed)
        for condition in CONDITIONS:
            points = experiment.curve(seed, condition)
            curves.append({"seed": seed, "pretraining": condition, "shared": shared[condition], "points": points})
            print(seed, condition, *(f"{point['pairs']}:{point['accuracy']:.3f}" for point in points), flush=True)
    results = {"settings": settings, "curves": curves}
    write(options.output, json.dumps(results, indent=1) + "\n")
    if options.output == HERE / "results.json":
        tables.render(results, HERE / "README.md")


class Experiment:
    """Runs in a folder, by seed and name."""

    def __init__(self, work, program, threads):
        self.work, self.program, self.threads = work, program, threads

    def write_data(self, seed):
        """Writes the sets of a seed; answers how much of the control's order each of them knows."""
        made = data.make(seed)
        folder = self.work / f"seed-{seed}/data"
        folder.mkdir(parents=True, exist_ok=True)
        for name, pairs in made["sets"].items():
            keep(folder / f"{name}.jsonl", data.lines(pairs))
        return made["shared"]

    def curve(self, seed, condition):
        """Measures on the test pairs by the number of fine-tuning pairs, 0 being pretraining alone."""
        init, points = MODEL, []
        if condition != "none":
            pretrained = self.train(seed, f"pretrain-{condition}", MODEL, condition)
            init, points = pretrained / "checkpoint", [measures(pretrained)[-1] | {"pairs": 0}]
        for pairs, every in STRETCHES:
            options = ("--max-steps", pairs // BATCH, "--evaluate-every", every // BATCH)
            tuned = self.train(seed, f"finetune-{condition}-{pairs}", init, "T0", *options)
            known = max((point["pairs"] for point in points), default=0)
            points += [point for point in measures(tuned) if point["pairs"] > known]
        return points

    def train(self, seed, name, init, train, *options):
        """The folder of a run, which is made if it is not there."""
        folder = self.work / f"seed-{seed}"
        run = folder / name
        if not (run / "checkpoint").is_dir():
            files = ("--train", folder / f"data/{train}.jsonl", "--dev", folder / "data/test.jsonl")
            where = ("--init", init, "--output", run, "--seed", seed, "--threads", self.threads)
            argv = [*self.program, "run", "--config", RECIPE, *where, *files, *options]
            subprocess.run([str(word) for word in argv], check=True, stdout=subprocess.DEVNULL)
        # The state of the optimiser is large, and only for going on.
        shutil.rmtree(run / "states", ignore_errors=True)
        return run


def measures(run):
    """What a run measured on the test pairs, in order."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {"pairs": record["step"] * BATCH, "accuracy": record["accuracy"], "loss": record["preference_loss"]}
        for record in records
        if record["split"] == "dev"
    ]


def describe():
    """What the figures depend on, beside the code."""
    weights = (MODEL / "model.safetensors").read_bytes()
    return {
        "model": str(MODEL.relative_to(ROOT)),
        "sha256": hashlib.sha256(weights).hexdigest(),
        "recipe": OPTIONS,
        "pairs": {"test": data.TEST_PAIRS, "pretraining": data.PRETRAINING_PAIRS, "finetuning": data.FINETUNING_PAIRS},
    }


def keep(path, content):
    """Writes a file, or makes sure that it says what was to be written."""
    if not path.exists():
        write(path, content)
    elif path.read_text() != content:
        sys.exit(f"{path} is of an experiment with other settings: name another folder")


def write(path, content):
    """Writes a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(content)
    unfinished.replace(path)


def program(options):
    """The words that start `plumb-train`."""
    if options.plumb_train:
        return [options.plumb_train]
    manifest = ROOT / "Cargo.toml"
    return ["cargo", "run", "--quiet", "--release", "--manifest-path", manifest, "-p", "plumb-trainer", "--"]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path, help="folder for data and runs, 0.2 GB a seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of a run; all give the same bits")
    parser.add_argument("--plumb-train", metavar="PROGRAM", help="default: what cargo builds of this repository")
    parser.add_argument("--output", type=pathlib.Path, default=HERE / "results.json", metavar="FILE",
                        help="default: results.json beside this file, from which README.md is rendered")  # fmt: skip
    options = parser.parse_args()
    options.work, options.output = options.work.resolve(), options.output.resolve()
    return options


if __name__ == "__main__":
    main()
