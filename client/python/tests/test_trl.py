"""Reward functions, and trainings of TRL with them."""

import asyncio
import itertools
import json
import logging
import pickle
import runpy

import grpc
import pytest
from conftest import FIXTURES, PACKAGE, ROOT, expected
from fake import fake, refuse, scores, versions

from plumb_client import PATIENT, Client, InvalidArgumentError, NotFoundError, RetryPolicy, Text, aio
from plumb_client._proto import preference_pb2, tokens_pb2
from plumb_client.trl import AsyncPlumbReward, PlumbReward

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]
FOUR, FIVE = ([{"role": "assistant", "content": content}] for content in ("4.", "Five."))


def ask(kind, server, prompts, completions, **options):
    """What a reward function says to a trainer, which also hands over the columns of its data."""
    columns = {"completion_ids": [[1]] * len(prompts), "solution": ["4"] * len(prompts), "trainer_state": None}
    if kind == "sync":
        return PlumbReward(server.url, **options)(prompts=prompts, completions=completions, **columns)
    return asyncio.run(AsyncPlumbReward(server.url, **options)(prompts=prompts, completions=completions, **columns))


both = pytest.mark.parametrize("kind", ["sync", "asyncio"])
HUMAN = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
]


@both
@pytest.mark.parametrize(
    ("prompt", "completions", "strings", "items"),
    [
        ("2 + 2 =", [" 4.", " 5."], "text", [Text("2 + 2 = 4."), Text("2 + 2 = 5.")]),
        ("2 + 2?", ["4.", ""], "turns", [("2 + 2?", "4."), ("2 + 2?", "")]),
        (HUMAN, [" Bye."], "transcript", [(TURNS, "Bye.")]),
        (HUMAN + " Good", [" bye."], "transcript", [(TURNS, "Good bye.")]),
        (HUMAN, [" A.\n\nHuman: B"], "transcript", [(TURNS, "A.\n\nHuman: B")]),
        (QUESTION, [FOUR, FIVE], "text", [[*QUESTION, *FOUR], [*QUESTION, *FIVE]]),
        (QUESTION, ["4."], "text", [("What is 2 + 2?", "4.")]),
    ],
)
def test_completions_get_the_rewards_of_the_client(kind, server, client, prompt, completions, strings, items):
    found = ask(kind, server, [prompt] * len(completions), completions, strings=strings, model="pm")
    assert found == [score.reward for score in client.score(items)]


@both
def test_a_completion_without_a_score(kind, server, caplog):
    prompts, completions = ["", "a"], ["", "b"]
    with pytest.raises(InvalidArgumentError, match="item 0"):
        ask(kind, server, prompts, completions, model="pm")
    with caplog.at_level(logging.WARNING):
        none, reward = ask(kind, server, prompts, completions, model="pm", on_error="none")
    assert (none, type(reward)) == (None, float)
    assert "1 of 2 completions have no reward" in caplog.text
    with pytest.raises(NotFoundError):
        ask(kind, server, prompts, completions, model="nobody", on_error="none")
    with pytest.raises(TypeError):
        ask(kind, server, [QUESTION], [[{"role": "assistant", "tool_calls": []}]], model="pm", on_error="raise")


@both
def test_rewards_of_several_versions_are_warned_of(kind, caplog):
    with fake(versions(1, 1, 2, 2)) as target:
        reward = (PlumbReward if kind == "sync" else AsyncPlumbReward)(target, batch_size=1, concurrency=1)

        def ask(warnings):
            found = reward(prompts=["a", "b"], completions=["c", "d"])
            assert (asyncio.run(found) if kind == "asyncio" else found) == [2.0, 2.0]
            assert len(caplog.records) == warnings

        ask(0)
        ask(1)


@both
def test_what_a_completion_calls_is_not_passed_over(kind):
    call = {"role": "assistant", "content": "5", "tool_calls": [{"function": {"name": "add"}}]}
    with fake(conversations) as target:
        kinds = {"sync": PlumbReward, "asyncio": AsyncPlumbReward}
        for on_error in ("raise", "none"):
            reward = kinds[kind](target, on_error=on_error)

            def ask(reward=reward):
                found = reward(prompts=[QUESTION] * 2, completions=[[call], FOUR])
                return asyncio.run(found) if kind == "asyncio" else found

            if on_error == "none":
                assert ask() == [None, 2.0]
            else:
                with pytest.raises(TypeError, match="calls tools"):
                    ask()


@pytest.mark.parametrize(
    ("prompt", "completion", "response"),
    [
        ("Human: q\n\nAssistant: The answer is ", "4.", "The answer is 4."),
        ("Human: q\n\nAssistant: The answer is", " 4.", "The answer is 4."),
        ("Human: q\n\nAssistant: def f():\n    ", "return 4\n", "def f():\n    return 4"),
        ("Human: q\n\nAssistant: ", "4.", "4."),
        ("Human: q ", "4.", "4."),
    ],
)
def test_white_space_between_what_was_begun_and_its_completion_stays(prompt, completion, response):
    seen = []
    with fake(lambda request, context: conversations(request, seen=seen)) as target:
        PlumbReward(target, strings="transcript")([prompt], [completion])
    assert seen == [[("user", "q"), ("assistant", response)]]


def conversations(request, context=None, seen=None):
    """Rewards that are the lengths of the last turns."""
    answer = preference_pb2.ScoreResponse()
    for item in request.items:
        turns = [(turn.role, turn.content) for turn in item.conversation.messages]
        (seen if seen is not None else []).append(turns)
        answer.results.add(score={"reward": len(turns[-1][1]) if turns else 0})
    return answer


def test_a_training_waits_for_its_server():
    assert PlumbReward("127.0.0.1:1").client._options == Client.patient("127.0.0.1:1")._options
    assert type(AsyncPlumbReward("127.0.0.1:1").client) is aio.Client
    assert AsyncPlumbReward("127.0.0.1:1").client._options.retry == PATIENT
    calls = itertools.count()

    def behave(request, context):
        if next(calls) < 8:
            refuse(context, grpc.StatusCode.UNAVAILABLE)
        return scores(request)

    with fake(behave) as target, pytest.MonkeyPatch.context() as patch:
        delay = RetryPolicy.delay
        patch.setattr(RetryPolicy, "delay", lambda *given, jitter=0.0: delay(*given[:-1], jitter))
        assert PlumbReward(target, strings="text")(["1"], ["2"]) == [12.0]


def test_names_and_copies(server):
    with Client(server.url) as client:
        assert [PlumbReward(client, **given).__name__ for given in ({}, {"model": "pm"}, {"name": "helpful"})] == [
            "plumb",
            "pm",
            "helpful",
        ]
        reward = PlumbReward(client, model="pm")
        assert pickle.loads(pickle.dumps(reward))(["a"], ["b"]) == reward(["a"], ["b"])
    for wrong in ({"strings": "chat"}, {"on_error": "return"}):
        with pytest.raises(ValueError, match="is one of"):
            PlumbReward(**wrong)


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    module.set_num_threads(1)
    return module


@pytest.fixture
def tokenizer(torch):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "llama-pm", padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_of_ids_has_the_logits_of_transformers(torch, tokenizer, server, side):
    from plumb_client.reward_model import PlumbRewardModel

    cases = expected("llama-pm")["cases"]
    model = PlumbRewardModel(server.url, tokenizer, token_ids=True, model="llama-pm")
    for _ in range(2):
        batch = tokenizer.pad({"input_ids": [case["token_ids"] for case in cases]}, padding_side=side)
        logits = model(**batch.convert_to_tensors("pt")).logits
        assert (logits.shape, logits.dtype) == ((len(cases), 1), torch.float32)
        assert logits[:, 0].tolist() == pytest.approx([case["reward"] for case in cases], abs=1e-4)
    wrong = PlumbRewardModel(server.url, tokenizer, token_ids=True, model="pm")
    with pytest.raises(ValueError, match="another tokenizer"):
        wrong(**batch)


def test_a_reward_model_of_texts(tokenizer, server, client):
    from plumb_client.reward_model import PlumbRewardModel
    from plumb_client.transcript import turns

    texts = [HUMAN + " Bye.", "\n\nHuman: 2 + 2?\n\nAssistant: 4."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    for item in (Text, turns):
        logits = PlumbRewardModel(client, tokenizer, item=item)(**batch).logits
        wanted = [score.reward for score in client.score([item(text) for text in texts])]
        assert logits[:, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert PlumbRewardModel(client, tokenizer).config._name_or_path == "plumb"


def test_a_reward_model_of_chats_has_the_logits_of_transformers(tokenizer, server):
    from plumb_client.reward_model import PlumbRewardModel

    talks = expected("llama-pm")["conversations"]
    model = PlumbRewardModel(server.url, tokenizer, model="llama-pm")
    for with_bos in (True, False):
        texts = [talk["rendered"] if with_bos else talk["rendered"].removeprefix("<|bos|>") for talk in talks]
        batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        logits = model(**batch).logits
        assert logits[:, 0].tolist() == pytest.approx([talk["reward"] for talk in talks], abs=1e-4)
    with pytest.raises(ValueError, match="does not know the special token"):
        PlumbRewardModel(server.url, tokenizer, model="pm")(**batch)


class Recorder:
    """A server whose tokenizer is one of Transformers, and what it was asked to score and to tokenize."""

    def __init__(self, tokenizer):
        self.tokenizer, self.scored, self.tokenized = tokenizer, [], []

    def __call__(self, request, context):
        if isinstance(request, preference_pb2.ScoreRequest):
            self.scored += [item.text or list(item.token_ids.ids) or item.conversation for item in request.items]
            return preference_pb2.ScoreResponse(results=[{"score": {"reward": 1.0}} for _ in request.items])
        self.tokenized.append(len(request.texts))
        answer = tokens_pb2.TokenizeResponse()
        for text in request.texts:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            special = [self.tokenizer.added_tokens_decoder.get(i) is not None for i in ids]
            answer.tokenized.add(tokens=[{"id": i, "special": s} for i, s in zip(ids, special, strict=True)])
        return answer


def test_special_tokens_of_a_decoded_text(torch, tokenizer):
    from transformers import AutoTokenizer

    from plumb_client.reward_model import PlumbRewardModel

    chat = "<|user|>Hi , you\n<|assistant|>Ho .<|eos|>"
    ids = tokenizer(["<|bos|>" + chat, "A ."], add_special_tokens=False, padding=True, return_tensors="pt")
    same, other = Recorder(tokenizer), Recorder(AutoTokenizer.from_pretrained(ROOT / "server" / "models" / "pm"))
    with fake(same) as target:
        PlumbRewardModel(target, tokenizer)(**ids)
        # Who reads the text gets words.
        PlumbRewardModel(target, tokenizer, item=str)(**ids)
    assert same.scored == [chat, "A .", chat.removesuffix("<|eos|>"), "A ."]
    assert max(same.tokenized) == 1
    tokenizer.pad_token_id = 5
    ended = torch.tensor([[0, *tokenizer.encode("A .", add_special_tokens=False), 1, 5, 5]])
    with fake(other) as target:
        # Where there is no mask, the padding says what counts.
        PlumbRewardModel(target, tokenizer)(ended)
        assert other.scored == ["A ."]
        with pytest.raises(ValueError, match=r"does not know the special token '<\|(user|assistant)\|>'"):
            PlumbRewardModel(target, tokenizer)(**ids)
        PlumbRewardModel(target, tokenizer, item=str)(**ids)
    assert other.scored == ["A .", chat.removesuffix("<|eos|>"), "A ."]


def test_few_texts_say_whether_a_tokenizer_is_the_same(torch, tokenizer):
    from plumb_client.reward_model import PlumbRewardModel

    ids = torch.tensor([tokenizer.encode("A text.")] * 300)
    recorder = Recorder(tokenizer)
    with fake(recorder) as target:
        model = PlumbRewardModel(target, tokenizer, token_ids=True)
        model(ids)
        model(ids)
    assert recorder.tokenized == [16]
    assert len(recorder.scored) == 600


def test_what_ppo_asks_a_reward_model(torch, tokenizer, client):
    utils = pytest.importorskip("trl.experimental.utils")
    from plumb_client.reward_model import PlumbRewardModel

    texts = ["A question? An answer.", "Another? No."]
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.full((2, 2), tokenizer.pad_token_id)], dim=1)
    _, rewards, _ = utils.get_reward(PlumbRewardModel(client, tokenizer), ids, tokenizer.pad_token_id, 3)
    assert rewards.tolist() == pytest.approx([score.reward for score in client.score(texts)], abs=1e-6)


@pytest.fixture
def train(torch, server, tmp_path):
    """Runs an example's training of a tiny random policy."""

    def run(example, *arguments):
        prompts = tmp_path / "prompts.jsonl"
        said = ["What is 2 + 2?", "Hello", "Name a city.", "Why?"]
        prompts.write_text("".join(json.dumps({"prompt": words}) + "\n" for words in said))
        common = ["--server", server.url, "--reward-model", "pm", "--prompts", prompts, "--output", tmp_path, "--cpu"]
        main = runpy.run_path(str(PACKAGE / "examples" / example))["main"]
        rewards = main([str(word) for word in (FIXTURES / "llama-lm", *common, *arguments)])
        assert (tmp_path / "model.safetensors").exists()
        return rewards

    return run


def test_rewards_rise_in_grpo(train):
    pytest.importorskip("trl")
    rewards = train("grpo.py", "--steps", 30, "--batch", 32, "--max-new-tokens", 4, "--lr", 3e-2, "--beta", 0)
    assert len(rewards) == 30
    first, last = sum(rewards[:10]) / 10, sum(rewards[-10:]) / 10
    assert last > first + 0.1, rewards


def test_ppo(train):
    pytest.importorskip("trl.experimental.ppo", reason="PPO is in TRL up to 1.12")
    rewards = train("ppo.py", "--episodes", 8, "--batch", 4, "--max-new-tokens", 4, "--lr", 1e-3)
    assert len(rewards) == 2


def trained(trainer):
    trainer.train()
    return next(line for line in trainer.state.log_history if "loss" in line)


def tiny(kind, folder, **options):
    """Arguments of a training of one step on the CPU."""
    cpu = {"use_cpu": True, "bf16": False, "model_init_kwargs": {"dtype": "float32"}}
    quiet = {"save_strategy": "no", "report_to": "none", "logging_steps": 1}
    return kind(output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, **cpu, **quiet, **options)


def test_several_rewards_with_weights_in_rloo(tokenizer, server, tmp_path):
    pytest.importorskip("trl", minversion="1.14", reason="older versions of TRL do not await objects")
    from datasets import Dataset
    from trl import RLOOConfig, RLOOTrainer

    from plumb_client.reward_model import PlumbRewardModel

    options = {"model": "pm", "truncation": "left"}
    trainer = RLOOTrainer(
        model=str(FIXTURES / "llama-lm"),
        processing_class=tokenizer,
        reward_funcs=[
            PlumbReward(server.url, name="one", **options),
            AsyncPlumbReward(server.url, name="two", **options),
            PlumbRewardModel(server.url, tokenizer, name="three", **options),
        ],
        reward_processing_classes=[None, None, tokenizer],
        train_dataset=Dataset.from_dict({"prompt": ["2 + 2 =", "Hello"]}),
        args=tiny(
            RLOOConfig, tmp_path, num_generations=2, max_completion_length=4, reward_weights=[0.5, 1.0, 2.0], beta=0.0
        ),
    )
    line = trained(trainer)
    one, two, three = (line[f"rewards/{name}/mean"] for name in ("one", "two", "three"))
    assert one == two == pytest.approx(three, abs=1e-4)
    assert line["reward"] == pytest.approx(3.5 * one, abs=1e-4)


def test_a_reward_model_in_online_dpo(tokenizer, server, tmp_path):
    dpo = pytest.importorskip("trl.experimental.online_dpo")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from plumb_client.reward_model import PlumbRewardModel

    policy = AutoTokenizer.from_pretrained(FIXTURES / "llama-lm", padding_side="left")
    policy.pad_token = policy.eos_token
    trainer = dpo.OnlineDPOTrainer(
        model=str(FIXTURES / "llama-lm"),
        processing_class=policy,
        reward_funcs=PlumbRewardModel(server.url, tokenizer, token_ids=True, model="llama-pm"),
        reward_processing_classes=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [QUESTION] * 4}),
        args=tiny(dpo.OnlineDPOConfig, tmp_path, max_new_tokens=4),
    )
    assert trained(trainer)["objective/scores_margin"] > 0
