"""vLLM CPU (offline, no server in the way), bf16: rewards of real texts. usage: text_vllm.py MODEL TEXTS.jsonl

32 texts a call in the order of the file, each text once, by an engine that has only seen other tokens. Prefix caching
is as vLLM has it by default. Texts are tokenised before the clock starts, and all their tokens count, cached ones too.
"""

import json
import os
import random
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
CALL = 32


def main():
    from transformers import AutoTokenizer
    from vllm import LLM

    folder, path = sys.argv[1:]
    texts = [json.loads(line)["text"] for line in open(path)]
    ids = AutoTokenizer.from_pretrained(folder)(texts).input_ids
    engine = LLM(model=folder, runner="pooling", dtype="bfloat16", max_model_len=4096, enforce_eager=True)

    def run(sequences):
        engine.classify([{"prompt_token_ids": tokens} for tokens in sequences], use_tqdm=False)

    run([[random.randrange(5, 49000) for _ in range(256)] for _ in range(4)])
    begun = time.perf_counter()
    for first in range(0, len(ids), CALL):
        run(ids[first : first + CALL])
    seconds = time.perf_counter() - begun
    tokens = sum(map(len, ids))
    print(f"vllm text, {tokens} tokens: {tokens / seconds:.1f} tok/s")


# vLLM starts processes that import this file.
if __name__ == "__main__":
    main()
