"""A model that `plumb-train` trained, opened by Transformers."""

from __future__ import annotations

import json
import subprocess

import pytest
from conftest import FIXTURES, PATIENCE, binary, running

import plumb_client

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def trained(tmp_path):
    """A preference model of a few steps, published."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "chosen": f"{i + 1}.", "rejected": "Go away."} for i in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(*arguments):
        command = [binary("plumb-train"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=5 * PATIENCE)
        assert done.returncode == 0, done.stderr

    train("prepare", "pairs", pairs, "--dev-share", "0.2", "--output", "data")
    options = ["--objective", "preference", "--init", FIXTURES / "llama-lm", "--lr", "3e-3", "--batch", "4"]
    train("run", *options, "--train", "data/train.jsonl", "--dev", "data/dev.jsonl", "--output", "run")
    train("publish", "run/checkpoint", "root", "--name", "mine")
    return tmp_path / "root" / "mine" / "1"


def test_rewards_are_those_of_transformers(trained, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    loader = transformers.AutoModelForSequenceClassification
    model, info = loader.from_pretrained(trained, dtype=torch.float32, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    dialogues = [
        [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": answer}]
        for i in (3, 30)
        for answer in (f"{i + 1}.", "Go away.")
    ]
    rewards = []
    for dialogue in dialogues:
        ids = tokenizer.apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            rewards.append(model.eval()(**ids).logits[0, 0].item())
    serving = running(tmp_path, "--model", f"mine={trained}", "--dtype", "f32")
    with serving as server, plumb_client.Client(server.url) as client:
        client.wait_ready(PATIENCE)
        found = [score.reward for score in client.score(dialogues)]
    assert found == pytest.approx(rewards, abs=1e-4)
    # Something was learned that both see.
    assert found[0] > found[1]
    assert found[2] > found[3]
