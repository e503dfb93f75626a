"""The HTTP gateway as the clients of other projects see it, each with the project's own code.

usage: check_gateway.py ADDRESS MODEL_FOLDER

ADDRESS is that of a gateway in front of the model of the folder, in f32. Expected rewards are computed by Transformers.
A check whose packages are missing is skipped, and says so; nothing but a Python is needed to run the script. Packages
are those of requirements-frameworks.txt and requirements-rollouts.txt; tests/frameworks.sh installs them.
"""

import asyncio
import importlib.util
import os
import sys
import types
from types import SimpleNamespace

ADDRESS, FOLDER = sys.argv[1:3]
URL = f"http://{ADDRESS}"
QUESTION = "What is 2 + 2?"
ANSWERS = ["It is 4.", "Five, I think.", "I do not know."]


class Expected:
    """Rewards by Transformers. A text gets the special tokens that it lacks, as everywhere in Plumb."""

    def __init__(self):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(FOLDER)
        model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1, dtype=torch.float32)
        self.model = model.eval()

    def of_ids(self, ids):
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0, 0].item()

    def of_text(self, text):
        bos = self.tokenizer.bos_token
        return self.of_ids(self.tokenizer(text.removeprefix(bos) if bos else text)["input_ids"])

    def of_turns(self, *turns):
        text = self.tokenizer.apply_chat_template(list(turns), tokenize=False)
        return self.of_text(text)


def turn(role, content):
    return {"role": role, "content": content}


def close(found, expected):
    assert abs(found - expected) < 1e-4, f"{found} is not {expected}"


def openrlhf(expected):
    """The executor that asks a remote reward model for every rollout."""
    # The package's own __init__ needs DeepSpeed and flash-attention; the modules that are used here do not.
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        raise ModuleNotFoundError("No module named 'openrlhf'")
    root = spec.submodule_search_locations[0]
    for name in ("openrlhf", "openrlhf.utils"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(root, *name.split(".")[1:])]
        sys.modules[name] = package
    from openrlhf.utils.agent import SingleTurnAgentExecutor

    tokenizer = expected.tokenizer
    prompt = tokenizer.apply_chat_template([turn("user", QUESTION)], tokenize=False, add_generation_prompt=True)
    response = tokenizer(ANSWERS[0], add_special_tokens=False)["input_ids"]

    class Engine:
        async def generate(self, token_ids, params, **kwargs):
            output = SimpleNamespace(token_ids=response, finish_reason="stop", logprobs=None)
            return SimpleNamespace(outputs=[output])

    async def run():
        executor = SingleTurnAgentExecutor(f"{URL}/get_reward")
        params = SimpleNamespace(max_tokens=16, logprobs=None)
        rollout = await executor.execute(prompt, "label", params, 512, tokenizer, Engine())
        many = await executor._fetch_rewards_via_http(ANSWERS * 200, [""] * 600, [""] * 600)
        return rollout, many

    rollout, many = asyncio.run(run())
    query = tokenizer.decode(rollout["observation_tokens"], skip_special_tokens=False)
    close(rollout["reward"][0], expected.of_text(query))
    assert rollout["scores"] == rollout["reward"] and rollout["extra_logs"] == {}, rollout
    rewards = [reward for answer in many for reward in answer["rewards"]]
    assert len(rewards) == 600 and rewards[:3] == rewards[-3:], rewards
    for reward, answer in zip(rewards, ANSWERS):
        close(reward, expected.of_text(answer))


def verl(expected):
    """The reward loop, as for a reward model behind vLLM and behind SGLang."""
    import numpy
    import torch
    from omegaconf import OmegaConf
    from tensordict import TensorDict
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
    from verl.protocol import DataProto

    tokenizer = expected.tokenizer
    response = torch.tensor([tokenizer(ANSWERS[1], add_special_tokens=False)["input_ids"]])
    batch = TensorDict({"responses": response, "attention_mask": torch.ones_like(response)}, batch_size=1)
    prompts = numpy.empty(1, dtype=object)
    prompts[0] = [turn("user", QUESTION)]
    data = DataProto(batch=batch, non_tensor_batch={"raw_prompt": prompts})
    for engine in ("vllm", "sglang"):
        # Its constructor fetches tokenizers and starts nothing; what asks for a reward is all there.
        worker = RewardLoopWorker.__new__(RewardLoopWorker)
        model = {"enable": True, "model_path": FOLDER, "rollout": {"name": engine}}
        worker.config = OmegaConf.create({"reward": {"reward_model": model, "custom_reward_function": {"path": None}}})
        worker.reward_router_address = ADDRESS
        worker.input_tokenizer = worker.reward_model_tokenizer = tokenizer
        found = asyncio.run(worker.compute_score_batch(data))
        close(found[0]["reward_score"], expected.of_turns(turn("user", QUESTION), turn("assistant", ANSWERS[1])))


def cohere(expected):
    """Both versions of the client."""
    import math

    import cohere

    clients = cohere.Client("any", base_url=URL), cohere.ClientV2("any", base_url=URL)
    rewards = [expected.of_turns(turn("user", QUESTION), turn("assistant", answer)) for answer in ANSWERS]
    order = sorted(range(len(ANSWERS)), key=lambda i: -rewards[i])
    for client in clients:
        results = client.rerank(model="llama-pm", query=QUESTION, documents=ANSWERS).results
        assert [result.index for result in results] == order, results
        for result in results:
            close(result.relevance_score, 1 / (1 + math.exp(-rewards[result.index])))
    results = clients[0].rerank(model="llama-pm", query=QUESTION, documents=ANSWERS, top_n=1).results
    assert [result.document.text for result in results] == [ANSWERS[order[0]]], results


def openai(expected):
    """Embeddings, plain and in base64, the list of models, and an error."""
    import openai

    client = openai.OpenAI(api_key="any", base_url=f"{URL}/v1", max_retries=0)
    for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        answer = client.embeddings.create(model="llama-pm", input=ANSWERS, **options)
        for data, text in zip(answer.data, ANSWERS, strict=True):
            vector = data.embedding
            if isinstance(vector, str):
                import base64
                import struct

                vector = struct.unpack("<f", base64.b64decode(vector))
            close(vector[0], expected.of_text(text))
    assert [(model.id, type(model.created)) for model in client.models.list()] == [("llama-pm", int)]
    try:
        client.embeddings.create(model="nobody", input="a")
    except openai.NotFoundError as error:
        assert "nobody" in error.body["message"], error.body
    else:
        raise AssertionError("an unknown model answered")


def main():
    try:
        expected = Expected()
    except ImportError as error:
        print(f"skipped: {error}; PLUMB_PYTHON names another Python")
        return
    for check in (openrlhf, verl, cohere, openai):
        try:
            check(expected)
        except ImportError as error:
            print(f"skipped {check.__name__}: {error}")
        else:
            print(f"ok {check.__name__}")


main()
