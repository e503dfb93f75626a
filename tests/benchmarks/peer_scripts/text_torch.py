"""Transformers, PyTorch CPU, bf16: rewards of real texts. usage: text_torch.py MODEL TEXTS.jsonl

Batches of 8 in the order of the file, padded to the longest on the right. Texts are tokenised before the clock starts,
and only their own tokens count.
"""

import json
import sys
import time

import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

BATCH = 8


def main():
    folder, path = sys.argv[1:]
    texts = [json.loads(line)["text"] for line in open(path)]
    ids = AutoTokenizer.from_pretrained(folder)(texts).input_ids
    model = LlamaForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.bfloat16).eval()
    batches = [padded(ids[first : first + BATCH], model.config.pad_token_id) for first in range(0, len(ids), BATCH)]
    with torch.inference_mode():
        model(torch.randint(5, 49000, (BATCH, 256)))
        begun = time.perf_counter()
        for tokens, mask in batches:
            model(tokens, attention_mask=mask)
        seconds = time.perf_counter() - begun
    tokens = sum(map(len, ids))
    print(f"torch text, {tokens} tokens: {tokens / seconds:.1f} tok/s")


def padded(ids, pad):
    longest = max(map(len, ids))
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return tokens, mask


if __name__ == "__main__":
    main()
