"""A model backend for EleutherAI's lm-evaluation-harness, which asks a Plumb server.

    python -m plumb_client.lm_eval --model plumb --model_args target=http://127.0.0.1:50051,model=lm --tasks hellaswag

is the harness's own command with this backend known to it; a program that imports this module can name it to
`lm_eval.simple_evaluate(model="plumb", ...)` too. Texts become tokens, are cut and are scored as by the harness's `hf`
backend, many calls at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from ..client import Client
from ..inputs import TokenIds
from ..results import ModelKind, ModelStatus

__all__ = ["PlumbLM"]

A = TypeVar("A")
B = TypeVar("B")
Encoded = tuple["tuple[str, str] | None", list[int], list[int]]

ITEMS = 4
"""Most texts in a call that scores: with 64 calls in flight, about what a server lets in at once. A question's answers,
which begin alike, still come together."""

TEXTS, TEXT_BYTES = 32, 1 << 20
"""Most texts, and bytes of them, in a call that tokenizes; a server takes 4 MiB."""

SAMPLING = {"top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float, "seed": int}
"""Generation arguments of a task that mean the same to Plumb."""


@register_model("plumb")
class PlumbLM(TemplateLM):  # type: ignore[misc]
    """A language model that a Plumb server has loaded.

    One version answers all of an evaluation: the one that the name means when it begins.
    """

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        model: str | None = None,
        version: int | None = None,
        label: str | None = None,
        tokenizer: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        concurrency: int = 64,
        timeout: float | None = None,
        **options: Any,
    ) -> None:
        """Connects to a server.

        Args:
            target: Its address, as `Client.patient` takes it; several are separated by semicolons or spaces.
            model: Name of the model; default: the server's language model.
            version: Its version, or `label` of it; default: the one labelled stable, else the newest.
            tokenizer: A folder or repository whose tokenizer and chat template Transformers reads here; default: the
                server's own.
            max_length: Most tokens of a context and what follows it. Default: the server's limit less one, since it
                is sent the last token too, which the `hf` backend leaves out.
            max_gen_toks: Most tokens to generate, for tasks that do not say.
            prefix_token_id: What stands before a text without a context; default: the BOS, or with `tokenizer` its EOS
                if it has none.
            add_bos_token: Whether special tokens are added to texts; default: as the tokenizer does.
            concurrency: Most calls in flight.
            timeout: Longest wait for an answer in seconds; default: none, as a call waits behind all others.
            options: More of `Client`'s, such as `api_key`. The harness's `batch_size`, `max_batch_size` and `device`
                are passed over: the server makes its own batches.
        """
        super().__init__()
        for name in ("batch_size", "max_batch_size", "device"):
            options.pop(name, None)
        self.client = Client.patient(target, timeout=timeout, concurrency=concurrency, **options)
        status = self._find(model, version, label)
        assert status.details is not None
        self.status, self._details = status, status.details
        self._model: dict[str, Any] = {"model": status.model.name, "version": status.model.version}
        self.max_length = max_length or self._details.max_input_tokens - 1
        self.max_gen_toks, self.add_bos_token, self.concurrency = max_gen_toks, add_bos_token, concurrency
        # As packed numbers: all texts of a task are here at once.
        self._ids: dict[tuple[str, bool | None], array[int]] = {}
        if tokenizer is not None:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self._prefix = self._prefix_token(prefix_token_id)

    def _find(self, name: str | None, version: int | None, label: str | None) -> ModelStatus:
        def speaks(status: ModelStatus) -> bool:
            return status.details is not None and status.details.kind is ModelKind.LANGUAGE

        # Later a server may be away for a while; at first its address is more likely to be wrong.
        status = self.client.model(model=name, version=version, label=label, timeout=60.0)
        if name is None and not speaks(status):
            # The default of the other kind.
            status = next((other for other in self.client.models() if other.is_default and speaks(other)), status)
        if not speaks(status):
            raise ValueError(f"{status.model.name} is no language model that is loaded: name one by `model`")
        return status

    def _prefix_token(self, given: int | None) -> tuple[int, str] | None:
        """The token that stands before a text without a context, and its text; None if nobody knows one."""
        if self.tokenizer is not None:
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            first = given if given is not None else bos if bos is not None else eos
            return None if first is None else (first, str(self.tokenizer.decode(first)))
        special = [token for token in self.client.tokenize(["a"], **self._model)[0] if token.special]
        if given is None:
            return (special[0].id, special[0].text) if special else None
        # What it is called matters only where texts get it.
        return given, next((token.text for token in special if token.id == given), "")

    # What the harness asks of a tokenizer.

    @property
    def eot_token_id(self) -> int:
        return self.prefix_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        if self._prefix is None:
            raise ValueError("nothing stands before a text of this model: name `prefix_token_id` or `tokenizer`")
        return self._prefix[0]

    @property
    def tokenizer_name(self) -> str:
        """For the keys of the harness's caches."""
        name = self._details.source if self.tokenizer is None else self.tokenizer.name_or_path
        return str(name).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of turns; without a generation prompt it ends in the last one's words, to be gone on with."""
        if self.tokenizer is not None:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )
        how: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "truncation": "left", **self._model}
        text = self.client.render(chat_history, **how).text
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; without `add_special_tokens` as the tokenizer does, but never a second BOS."""
        self._encode([(string, add_special_tokens)])
        return self._ids[string, self._adds(string, add_special_tokens)].tolist()

    def _adds(self, string: str, add_special_tokens: bool | None) -> bool | None:
        if add_special_tokens is None and self._prefix is not None:
            _, text = self._prefix
            if text and string.startswith(text):
                return False
        return self.add_bos_token if add_special_tokens is None else add_special_tokens

    def _encode(self, strings: Iterable[tuple[str, bool | None]]) -> None:
        """Tokenizes what is not yet known, many texts in a call."""
        wanted = {(string, self._adds(string, adds)) for string, adds in strings} - self._ids.keys()
        for adds in {adds for _, adds in wanted}:
            texts = sorted(string for string, its in wanted if its == adds)
            batches = list(_cut(texts))
            for batch, ids in zip(batches, self._map(partial(self._ask, adds), batches), strict=True):
                self._ids.update(zip(((text, adds) for text in batch), ids, strict=True))

    def _ask(self, adds: bool | None, texts: list[str]) -> list[array[int]]:
        if self.tokenizer is not None:
            options = {} if adds is None else {"add_special_tokens": adds}
            return [array("I", self.tokenizer.encode(text, **options)) for text in texts]
        answers = self.client.tokenize(texts, add_special_tokens=adds is not False, **self._model)
        return [array("I", [token.id for token in tokens]) for tokens in answers]

    # What the harness asks of a model.

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability in nats of each continuation, and whether greedy decoding gives it."""
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        texts = [(text, None) for context, continuation in pairs for text in (context.rstrip(), context + continuation)]
        self._encode(text for text in texts if text[0])
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        self._ids.clear()
        return answers

    def _loglikelihood_tokens(
        self, requests: list[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        def item(request: Encoded) -> TokenIds:
            _, context, continuation = request
            # Cut at the left; what the last token is followed by is not asked.
            ids = (context + continuation)[-(self.max_length + 1) :]
            return TokenIds(ids, max(1, len(ids) - len(continuation)))

        scores = self.client.score_stream(map(item, requests), objective="sum", batch_size=ITEMS, **self._model)
        answers = []
        bar = tqdm(scores, total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm)
        for (request, *_rest), score in zip(requests, bar, strict=True):
            assert score.log_probs is not None
            answers.append((score.log_probs.sum, score.log_probs.greedy))
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answers[-1])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each text, in windows of `max_length` tokens."""
        texts: list[str] = [request.args[0] for request in requests]
        self._encode((text, None) for text in texts)
        windows: list[Encoded] = []
        counts = []
        for text in texts:
            own = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            before = len(windows)
            windows.extend((None, *make_disjoint_window(window)) for window in own)
            counts.append(len(windows) - before)
        self._ids.clear()
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for text, found in zip(texts, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to the first of the request's stop strings."""
        calls: list[tuple[str, dict[str, Any]]] = [request.args for request in requests]
        self._encode((context, None) for context, _ in calls)
        answers = self._map(lambda call: self._generate(*call), calls)
        bar = tqdm(answers, total=len(calls), desc="Running generate_until requests", disable=disable_tqdm)
        texts = []
        for call, text in zip(calls, bar, strict=True):
            texts.append(text)
            self.cache_hook.add_partial("generate_until", call, text)
        self._ids.clear()
        return texts

    def _generate(self, context: str, asked: Mapping[str, Any]) -> str:
        options = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        until = [options["until"]] if isinstance(options["until"], str) else options["until"]
        most = options["max_gen_toks"]
        if most >= self.max_length:
            raise ValueError(f"no room for {most} generated tokens: max_length is {self.max_length}")
        # A task that samples and names no temperature means the model's own distribution.
        temperature = options.get("temperature", 1.0) if options["do_sample"] else 0.0
        generation = self.client.generate(
            TokenIds(self.tok_encode(context)[-(self.max_length - most) :]),
            temperature=temperature,
            max_new_tokens=most,
            stop_strings=[text for text in until if text],
            **{name: kind(options[name]) for name, kind in SAMPLING.items() if options.get(name) is not None},
            **self._model,
        )
        text: str = postprocess_generated_text(generation.text, until, None)
        return text

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        return {
            "model_num_parameters": self._details.parameters,
            "model_dtype": self._details.dtype,
            "model_revision": str(self.status.model.version),
            "model_sha": self.status.model.weights_digest,
        }

    def _map(self, call: Callable[[A], B], items: Sequence[A]) -> Iterable[B]:
        """Answers in order, many calls at once."""
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="plumb") as threads:
            yield from threads.map(call, items)


def _cut(texts: list[str]) -> Iterator[list[str]]:
    """Texts as calls take them; one that is longer has a call of its own."""
    batch: list[str] = []
    size = 0
    for text in texts:
        more = len(text.encode(errors="replace"))
        if batch and (len(batch) == TEXTS or size + more > TEXT_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += more
    if batch:
        yield batch
