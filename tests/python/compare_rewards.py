"""Rewards of a running server against Transformers in this process, on real dialogues.

usage: compare_rewards.py ADDRESS MODEL_FOLDER DIALOGUES.jsonl[.gz] [COUNT] [TOLERANCE]

A line of the file is hh-rlhf's: {"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}. Both sides are scored as
plain text, each alone in Transformers (f32) and all together on the server. Prints the largest difference, and ends
with status 1 if it is above the tolerance.

Needs the packages grpcio, grpcio-reflection, protobuf, torch and transformers.
"""

import gzip
import json
import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from plumb_reflection import Server


def main():
    address, folder, path, count, tolerance = (sys.argv[1:] + ["100", "1e-3"][len(sys.argv) - 4 :])[:5]
    with (gzip.open if path.endswith(".gz") else open)(path, "rt") as file:
        lines = [json.loads(line) for _, line in zip(range(int(count) // 2), file)]
    texts = [line[side] for line in lines for side in ("chosen", "rejected")]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in texts]

    answer = Server(address)("plumb.v1.Preference/Score", {"items": [{"text": text} for text in texts]})
    found = [result["score"]["reward"] for result in answer["results"]]
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    pairs = list(zip(found[::2], found[1::2], expected[::2], expected[1::2]))
    clear = [pair for pair in pairs if abs(pair[2] - pair[3]) > 0.1]
    agree = sum((a > b) == (c > d) for a, b, c, d in clear)
    print(f"{len(texts)} dialogues, rewards from {min(expected):.3f} to {max(expected):.3f}")
    print(f"largest difference {max(differences):.2e}, mean {sum(differences) / len(differences):.2e}")
    print(f"pairs with a margin above 0.1: {len(clear)}, in the same order: {agree}")
    return max(differences) > float(tolerance) or agree < len(clear)


sys.exit(main())
