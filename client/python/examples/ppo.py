"""PPO with rewards of a Plumb server, by the trainer that TRL has up to version 1.12.

python ppo.py POLICY --server http://127.0.0.1:50051 --reward-model pm --prompts prompts.jsonl --output out

Every line of the prompts has a `prompt`, the user's words. The policy goes on with a transcript, from which the reward
model's turns are read.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from plumb_client import transcript
from plumb_client.reward_model import PlumbRewardModel


def main(arguments: list[str] | None = None) -> list[float]:
    """The mean reward of every batch of episodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policy")
    parser.add_argument("--server", help="addresses, separated by commas; default: PLUMB_SERVER")
    parser.add_argument("--reward-model", help="the server's name of it")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", default="ppo")
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32, help="episodes in a batch, on every device")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.policy, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    said = [json.loads(line)["prompt"] for line in given.prompts.read_text().splitlines()]
    prompts = [tokenizer(f"\n\nHuman: {words}\n\nAssistant:") for words in said]
    value = AutoModelForSequenceClassification.from_pretrained(given.policy, num_labels=1, dtype="float32")
    policy, reference = (AutoModelForCausalLM.from_pretrained(given.policy, dtype="float32") for _ in range(2))
    trainer = PPOTrainer(
        model=policy,
        ref_model=reference,
        value_model=value,
        reward_model=PlumbRewardModel(
            given.server, tokenizer, item=transcript.turns, model=given.reward_model, truncation="left"
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"input_ids": prompt["input_ids"]} for prompt in prompts]),
        args=PPOConfig(
            output_dir=given.output,
            total_episodes=given.episodes,
            per_device_train_batch_size=given.batch,
            local_rollout_forward_batch_size=given.batch,
            response_length=given.max_new_tokens,
            learning_rate=given.lr,
            num_sample_generations=0,
            use_cpu=given.cpu,
            bf16=not given.cpu,
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model()
    return [line["objective/scores"] for line in trainer.state.log_history if "objective/scores" in line]


if __name__ == "__main__":
    main()
