"""The backend of lm-evaluation-harness against the harness's own for Transformers, on the same models and tasks."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from conftest import FIXTURES, PATIENCE, ROOT, Server, running
from fake import fake, refuse, retry_info

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
# Threads that wait for each other on a busy machine take longer than one.
torch.set_num_threads(1)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import plumb_client  # noqa: E402
from plumb_client._proto import models_pb2, preference_pb2, tokens_pb2  # noqa: E402
from plumb_client.lm_eval import PlumbLM  # noqa: E402

FOLDERS = {"lm": ROOT / "server" / "models" / "lm", "llama-lm": FIXTURES / "llama-lm"}
WORDS = "the a cat dog house tree of in on and is was big small red saw found water bird day night".split()  # noqa: SIM905
MAX_LENGTH = 96
"""Of tokens: what some of the texts below are longer than."""


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of every kind, over local files."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(3)

    def choices(words: int) -> dict[str, Any]:
        endings = [sentence(rng, rng.randint(1, 6)).lower() for _ in range(3)]
        # One that is a single token, and one that begins another.
        return {"said": sentence(rng, words), "endings": [*endings, "the", "the cat"], "label": rng.randrange(5)}

    documents = {
        "choices": [choices(rng.randint(2, 12)) for _ in range(10)] + [choices(150), {**choices(3), "said": ""}],
        "texts": [{"text": sentence(rng, words)} for words in (1, 5, 12, 40, 400)],
        "prompts": [{"said": sentence(rng, words), "answer": " the"} for words in (1, 3, 6, 9, 200)],
    }
    configs = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{said}}",
            "doc_to_target": "label",
            "doc_to_choice": "endings",
            "metric_list": [{"metric": metric} for metric in ("acc", "acc_norm")],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        },
        "prompts": {
            "output_type": "generate_until",
            "doc_to_text": "{{said}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n\n", " and"], "max_gen_toks": 12},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, config in configs.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents[name]))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
        whole = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        # JSON is YAML.
        (folder / f"{name}.yaml").write_text(json.dumps(whole | config))
    return folder


@pytest.fixture(scope="module", params=["f32", "bf16"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, str]]:
    folders = {**FOLDERS, "qwen2-lm": FIXTURES / "qwen2-lm"}
    models = (("--model", f"{name}={folder}") for name, folder in folders.items())
    arguments = [argument for pair in models for argument in pair]
    with running(tmp_path_factory.mktemp("server"), *arguments, "--dtype", request.param) as server:
        with plumb_client.Client(server.url) as client:
            client.wait_ready(PATIENCE)
        yield server, request.param


def evaluate(tasks: Path, model: str, arguments: dict[str, Any], **options: Any) -> dict[str, Any]:
    names = ["local_choices", "local_texts", "local_prompts"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model, arguments, names, task_manager=manager, device="cpu", bootstrap_iters=0, **options
    )
    return found


@functools.cache
def transformers(tasks: Path, folder: Path, dtype: str, **options: Any) -> dict[str, Any]:
    torch_type = {"f32": "float32", "bf16": "bfloat16"}[dtype]
    arguments = {"pretrained": str(folder), "dtype": torch_type, "softmax_dtype": "float32", "max_length": MAX_LENGTH}
    return evaluate(tasks, "hf", arguments, **options)


def same(found: dict[str, Any], expected: dict[str, Any], dtype: str) -> None:
    """The same answers to all requests, and the same numbers from them; in bf16 near ones, and texts may part."""
    tolerance = {"f32": 1e-4, "bf16": 2e-2}[dtype]
    for name, samples in expected["samples"].items():
        if name == "local_prompts" and dtype == "bf16":
            continue
        pairs = zip(found["samples"][name], samples, strict=True)
        for ours, theirs in ((a["filtered_resps"], b["filtered_resps"]) for a, b in pairs):
            if name == "local_prompts":
                assert ours == theirs
                continue
            flat = [[x if isinstance(x, tuple | list) else (x, None) for x in answers] for answers in (ours, theirs)]
            for (log_prob, greedy), (expected_log_prob, expected_greedy) in zip(*flat, strict=True):
                assert log_prob == pytest.approx(expected_log_prob, rel=tolerance, abs=tolerance)
                assert greedy == expected_greedy
    for name, numbers in expected["results"].items():
        for metric, value in numbers.items():
            if isinstance(value, float):
                assert found["results"][name][metric] == pytest.approx(value, rel=10 * tolerance), (name, metric)


@pytest.mark.parametrize(("model", "local"), [("lm", False), ("llama-lm", False), ("llama-lm", True)])
def test_all_kinds_of_requests(served: tuple[Server, str], tasks: Path, model: str, local: bool) -> None:
    server, dtype = served
    arguments = {"target": server.url, "model": model, "max_length": MAX_LENGTH}
    if local:
        arguments["tokenizer"] = str(FOLDERS[model])
    found, expected = evaluate(tasks, "plumb", arguments), transformers(tasks, FOLDERS[model], dtype)
    same(found, expected, dtype)
    assert found["config"]["model_dtype"] == dtype


@pytest.mark.parametrize("served", ["f32"], indirect=True)
@pytest.mark.parametrize("model", FOLDERS)
def test_chat_templates(served: tuple[Server, str], tasks: Path, model: str) -> None:
    server, dtype = served
    arguments = {"target": server.url, "model": model, "max_length": MAX_LENGTH}
    found = evaluate(tasks, "plumb", arguments, apply_chat_template=True)
    same(found, transformers(tasks, FOLDERS[model], dtype, apply_chat_template=True), dtype)
    turns = [{"role": "user", "content": "What is it? "}, {"role": "assistant", "content": "It is a"}]
    ours = PlumbLM(**arguments)
    theirs = PlumbLM(**arguments, tokenizer=str(FOLDERS[model]))
    assert ours.apply_chat_template(turns[:1]) == theirs.apply_chat_template(turns[:1])
    assert ours.apply_chat_template(turns, False) == theirs.apply_chat_template(turns, False)


@pytest.mark.parametrize("served", ["f32"], indirect=True)
def test_the_command(served: tuple[Server, str], tasks: Path, tmp_path: Path) -> None:
    server, _ = served
    command = [sys.executable, "-m", "plumb_client.lm_eval", "--model", "plumb", "--tasks", "local_choices"]
    arguments = f"target={server.url},model=lm"
    options = ["--model_args", arguments, "--include_path", str(tasks), "--output_path", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "client" / "python" / "src")}
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(results.read_text())["results"]["local_choices"]["acc,none"] <= 1


@pytest.mark.parametrize("served", ["f32"], indirect=True)
def test_what_cannot_be(served: tuple[Server, str]) -> None:
    server, _ = served
    lm = PlumbLM(server.url, "lm")
    # The server takes 1024 tokens, the one that is only asked for included.
    assert lm.max_length == 1023
    with pytest.raises(ValueError, match="prefix_token_id"):
        PlumbLM(server.url, "qwen2-lm").prefix_token_id  # noqa: B018
    with pytest.raises(ValueError, match="no room for 2000"):
        lm._generate("a", {"max_gen_toks": 2000})


class Busy:
    """A server with a language model of one-byte tokens, which scores nothing before it has refused many calls."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.scored, self.tokenized, self._lock = refusals, [], [], threading.Lock()

    def __call__(self, request: Any, context: Any) -> Any:
        if isinstance(request, models_pb2.GetModelRequest):
            details = {"kind": "MODEL_KIND_LANGUAGE", "max_input_tokens": 64}
            return models_pb2.GetModelResponse(model={"model": {"name": "lm", "version": 1}, "details": details})
        if isinstance(request, tokens_pb2.TokenizeRequest):
            self.tokenized.append([len(text) for text in request.texts])
            tokenized = [{"tokens": [{"id": byte} for byte in text.encode()[:8]]} for text in request.texts]
            return tokens_pb2.TokenizeResponse(tokenized=tokenized)
        with self._lock:
            self.refusals -= 1
            refused = self.refusals >= 0
        if refused:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info(1))
        self.scored.append(len(request.items))
        scored = [{"score": {"log_probs": {"sum": -float(len(i.token_ids.ids))}}} for i in request.items]
        return preference_pb2.ScoreResponse(results=scored)


def test_a_busy_server_does_not_end_an_evaluation() -> None:
    server = Busy(200)
    with fake(server) as target:
        lm = PlumbLM(target, prefix_token_id=0)
        requests = [
            Instance("loglikelihood", {}, (f"{i}", text), i) for i in range(40) for text in (" a", " bc", " d", " e")
        ]
        found = lm.loglikelihood(requests, disable_tqdm=True)
    assert [answer[0] for answer in found] == [-float(len("".join(request.args))) for request in requests]
    assert server.scored == [4] * 40


def test_long_texts_are_tokenized_in_calls_that_a_server_takes() -> None:
    server = Busy(0)
    texts = ["a" * 400_000, "b" * 400_000, "c" * 400_000, "d" * 3_000_000, *(f"e{i}" for i in range(64))]
    with fake(server) as target:
        lm = PlumbLM(target, prefix_token_id=0)
        server.tokenized.clear()
        lm._encode((text, None) for text in texts)
        assert all(lm.tok_encode(text) == list(text.encode()[:8]) for text in texts)
    assert all(sum(sizes) <= 1 << 20 or len(sizes) == 1 for sizes in server.tokenized)
    assert max(map(len, server.tokenized)) <= 32


def test_an_evaluation_waits_for_its_server() -> None:
    with fake(Busy(0)) as target:
        options = PlumbLM(f"{target}; {target}", prefix_token_id=0).client._options
    assert (options.targets, options.retry, options.timeout) == ((target, target), plumb_client.PATIENT, None)
