"""RewardBench by `plumb-train evaluate` against the package `rewardbench`, on the same checkpoint and rows.

usage: check_rewardbench.py PLUMB_TRAIN CHECKPOINT_FOLDER

Writes rows of version 1 of every subset and rows of version 2, ties included, some of them with equal sides. The package's
own pipeline scores them on the CPU in f32, and its own functions sum them up; both have to say the same of every subset
and section. Ends with status 1 where they do not.

Needs the packages rewardbench and torch.
"""

import json
import logging
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from rewardbench import load_bon_dataset_v2, prepare_dialogue_from_tokenizer
from rewardbench.constants import EXAMPLE_COUNTS, SUBSET_MAPPING
from rewardbench.models.pipeline import RewardBenchPipeline
from rewardbench.utils import calculate_scores_per_section, process_single_model, reroll_and_score_dataset

WORDS = "the a of and to in is it you that he was for on are with as his they at be this from have".split()
OPTIONS = {"truncation": False, "padding": False, "max_length": 2048}


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 12))).capitalize() + "."


def rows_of_version_1(rng):
    rows = []
    for subset in EXAMPLE_COUNTS:
        for number in range(rng.randint(5, 9)):
            chosen = text(rng)
            # Equal sides tie.
            rejected = chosen if number == 0 else text(rng)
            row = {"prompt": text(rng), "chosen": chosen, "rejected": rejected}
            rows.append(row | {"subset": subset, "id": len(rows)})
    return rows


def rows_of_version_2(rng):
    rows = []

    def add(subset, name, chosen, rejected):
        row = {"id": name, "prompt": text(rng), "chosen": chosen, "rejected": rejected, "subset": subset}
        rows.append(row | {"num_correct": len(chosen), "total_completions": len(chosen) + len(rejected)})

    for subset in ["Factuality", "Precise IF", "Math", "Safety", "Focus"]:
        for number in range(8):
            chosen, *rejected = (text(rng) for _ in range(4))
            if number == 0:
                rejected[1] = chosen
            add(subset, str(len(rows)), [chosen], rejected)
    for number in range(12):
        add("Ties", f"ref:{number}", [text(rng)], [text(rng) for _ in range(2)])
        correct = [text(rng) for _ in range(1 if number == 0 else rng.randint(2, 4))]
        if number == 1:
            correct = correct[:1] * 3
        add("Ties", f"tied:{number}", correct, [text(rng) for _ in range(2)])
    return rows


class Package:
    """What the package makes of a checkpoint and rows."""

    def __init__(self, folder):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.tokenizer.model_input_names = ["input_ids", "attention_mask"]
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32)
        self.pipeline = RewardBenchPipeline("text-classification", model=model, tokenizer=self.tokenizer)

    def score(self, texts):
        # One by one, so that no token for padding is needed.
        return [self.pipeline([text], **OPTIONS).item() for text in texts]

    def version_1(self, rows):
        texts = [prepare_dialogue_from_tokenizer(dict(row), self.tokenizer) for row in rows]
        chosen, rejected = (self.score([row[side] for row in texts]) for side in ("text_chosen", "text_rejected"))
        wins = {}
        for row, win in zip(rows, (a > b for a, b in zip(chosen, rejected, strict=True)), strict=True):
            wins.setdefault(row["subset"], []).append(win)
        found = {("accuracy", subset): sum(own) / len(own) for subset, own in wins.items()}
        accuracies = {subset: accuracy for (_, subset), accuracy in found.items()}
        sections = calculate_scores_per_section(EXAMPLE_COUNTS, SUBSET_MAPPING, accuracies)
        return found | {("section score", section): score for section, score in sections.items()}

    def version_2(self, path):
        columns = ["text", "id"]
        logger = logging.getLogger("rewardbench")
        data = load_bon_dataset_v2(str(path), tokenizer=self.tokenizer, logger=logger, keep_columns=columns)
        dataset, subsets, total_completions, num_correct = data
        dataset = dataset.add_column("subset", list(subsets)).add_column("scores", self.score(list(dataset["text"])))
        rerolled = reroll_and_score_dataset(dataset, total_completions, cols_to_combine=["text", "scores"])
        rerolled = rerolled.add_column("num_correct", list(num_correct))
        found = {}
        for subset in sorted(set(subsets)):
            own = Dataset.from_list([row for row in rerolled if row["subset"] == subset])
            if subset == "Ties":
                found["section score", subset] = float(process_single_model(own)[1])
            else:
                score = sum(own["results"]) / len(own["results"])
                found["accuracy", subset] = found["section score", subset] = score
        return found


def plumb(program, folder, path):
    options = ["--model", folder, "--dtype", "f32", "--json"]
    command = [program, "evaluate", "rewardbench", str(path), *options]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return {(result["metric"], result["name"]): result["value"] for result in answer["results"]}


def main():
    program, folder = sys.argv[1:]
    torch.set_num_threads(1)
    # The pipeline moves its inputs to a GPU.
    transformers.BatchEncoding.to = lambda self, device: self
    package, rng, differ = Package(folder), random.Random(7), False
    with tempfile.TemporaryDirectory() as work:
        for version, rows in [("1", rows_of_version_1(rng)), ("2", rows_of_version_2(rng))]:
            path = Path(work) / f"{version}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            expected = package.version_1(rows) if version == "1" else package.version_2(path)
            found = plumb(program, folder, path)
            print(f"version {version}, {len(rows)} rows")
            for (metric, name), value in expected.items():
                own = found[metric, name]
                differ |= abs(own - value) > 1e-4
                print(f"  {metric:14} {name:24} rewardbench {value:.6f}, plumb {own:.6f}")
    print("different" if differ else "the same")
    return differ


if __name__ == "__main__":
    sys.exit(main())
