"""GRPO with rewards of a Plumb server.

python grpo.py POLICY --server http://127.0.0.1:50051 --reward-model pm --prompts prompts.jsonl --output out

POLICY is a checkpoint with a chat template; every line of the prompts has a `prompt`, the user's words.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from plumb_client.trl import PlumbReward


def main(arguments: list[str] | None = None) -> list[float]:
    """The mean reward of every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy")
    parser.add_argument("--server", help="addresses, separated by commas; default: PLUMB_SERVER")
    parser.add_argument("--reward-model", help="the server's name of it")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", default="grpo")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32, help="completions in a step, on every device")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.04, help="weight of the distance to the policy at the start")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args(arguments)

    said = [json.loads(line)["prompt"] for line in given.prompts.read_text().splitlines()]
    trainer = GRPOTrainer(
        model=given.policy,
        processing_class=AutoTokenizer.from_pretrained(given.policy, padding_side="left"),
        reward_funcs=PlumbReward(given.server, model=given.reward_model, truncation="left"),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": words}] for words in said]}),
        args=GRPOConfig(
            output_dir=given.output,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            num_generations=given.group,
            max_completion_length=given.max_new_tokens,
            learning_rate=given.lr,
            beta=given.beta,
            use_cpu=given.cpu,
            bf16=not given.cpu,
            model_init_kwargs={"dtype": "float32"},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


if __name__ == "__main__":
    main()
