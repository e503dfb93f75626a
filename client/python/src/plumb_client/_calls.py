"""What both clients share and neither does itself: which calls there are, what is asked and what is made of the answer.

Nothing here knows a network. A method of `Calls` answers a `Call`; the clients say how it is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, TypeVar
from uuid import uuid4

import grpc

from . import inputs, results
from ._proto import common_pb2, generation_pb2, models_pb2, preference_pb2, tokens_pb2, wire_pb2
from .errors import InvalidArgumentError, PlumbError, UnavailableError
from .inputs import CallOptions, GenerateOptions, InputOptions, Item, ModelOptions, Objective, Prompt, TokenIds
from .options import Options
from .results import Health, ModelStatus, Ranking, Rendered, Score, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

A = TypeVar("A")

SERVICES = ("plumb.v1.Preference", "plumb.v1.Generation", "plumb.v1.Models", "plumb.v1.Tokens")
"""The services of the contract, by the names that `health` knows."""

OnError: TypeAlias = Literal["raise", "return"]


@dataclass(frozen=True)
class Call(Generic[A]):
    """A call that is about to be made."""

    method: str
    request: Any
    answer: type[Any]
    convert: Callable[[Any], A]
    timeout: float | None
    may_repeat: bool = True

    def stub(self) -> dict[str, Any]:
        """What a channel makes a stub of."""
        return {
            "method": self.method,
            "request_serializer": type(self.request).SerializeToString,
            "response_deserializer": self.answer.FromString,
        }


class _NamedOptions(CallOptions, ModelOptions, total=False):
    """Which model answers, and how the call is made."""


class Calls:
    """Every call of the contract, for a client with these options."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def rank(
        self,
        prompt: Prompt,
        candidates: Sequence[str | Sequence[int] | TokenIds],
        *,
        objective: Objective | None = None,
        **options: Unpack[InputOptions],
    ) -> Call[Ranking]:
        """Orders candidate responses to one prompt, which is computed once, best first.

        A candidate is text, or token ids where the prompt is. One that fails has an error in its place.
        """
        _check(options, InputOptions)
        _listed("candidates", candidates)
        request = preference_pb2.RankRequest(
            model=self._model(options),
            prompt=inputs.item(prompt, is_prompt=True),
            candidates=[inputs.candidate(candidate) for candidate in candidates],
            text=_text(options),
            objective=_word("objective", inputs.OBJECTIVES, objective),
            request_id=options.get("request_id", ""),
            priority=_word("priority", inputs.PRIORITIES, options.get("priority")),
        )
        convert = partial(results.ranking, asked=len(request.candidates))
        return self._call("Preference/Rank", request, preference_pb2.RankResponse, convert, options)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Call[generation_pb2.GenerateResponse]:
        """Samples text that follows a prompt; with `best_of` draws more samples and answers the best."""
        _check(options, GenerateOptions)
        sampling = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "banned_strings", "seed")
        stopping = ("max_new_tokens", "stop_strings", "ignore_eos")
        best_of = None
        if options.get("best_of") is not None:
            ranker = _spec(options.get("ranker"), options.get("ranker_version"), options.get("ranker_label"))
            best_of = generation_pb2.BestOf(samples=options["best_of"] or 0, ranker=ranker)
        request = generation_pb2.GenerateRequest(
            model=self._model(options),
            prompt=inputs.item(prompt, is_prompt=True),
            text=_text(options),
            sampling=generation_pb2.Sampling(**_lists(_given(options, sampling), "banned_strings")),
            stopping=generation_pb2.Stopping(**_lists(_given(options, stopping), "stop_strings")),
            best_of=best_of,
            request_id=options.get("request_id", ""),
            priority=_word("priority", inputs.PRIORITIES, options.get("priority")),
            **_given(options, ("n",)),
        )
        answer = generation_pb2.GenerateResponse
        return self._call("Generation/Generate", request, answer, lambda message: message, options)

    def tokenize(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, **options: Unpack[_NamedOptions]
    ) -> Call[list[tuple[Token, ...]]]:
        """The tokens of every text."""
        _check(options, _NamedOptions)
        _listed("texts", texts)
        request = tokens_pb2.TokenizeRequest(
            model=self._model(options), texts=list(texts), add_special_tokens=add_special_tokens
        )
        convert = partial(results.tokenized, asked=len(texts))
        return self._call("Tokens/Tokenize", request, tokens_pb2.TokenizeResponse, convert, options)

    def render(
        self, item: Item | Prompt, *, add_generation_prompt: bool = False, **options: Unpack[InputOptions]
    ) -> Call[Rendered]:
        """The exact text and tokens that `score` would feed the model, or `generate` with `add_generation_prompt`."""
        _check(options, InputOptions)
        request = tokens_pb2.RenderRequest(
            model=self._model(options),
            input=inputs.item(item, is_prompt=add_generation_prompt),
            text=_text(options),
            add_generation_prompt=add_generation_prompt,
        )
        return self._call("Tokens/Render", request, tokens_pb2.RenderResponse, results.rendered, options)

    def models(self, **options: Unpack[CallOptions]) -> Call[list[ModelStatus]]:
        """All versions of all models, by name, then version."""
        _check(options, CallOptions)
        request, answer = models_pb2.ListModelsRequest(), models_pb2.ListModelsResponse
        return self._call("Models/ListModels", request, answer, _statuses, options)

    def model(self, **options: Unpack[_NamedOptions]) -> Call[ModelStatus]:
        """One version; without a name the default model."""
        _check(options, _NamedOptions)
        request = models_pb2.GetModelRequest(model=self._model(options))
        return self._call("Models/GetModel", request, models_pb2.GetModelResponse, _status, options)

    def load_version(
        self,
        name: str,
        source: str,
        *,
        version: int | None = None,
        adapter: str = "",
        revision: str = "",
        **options: Unpack[CallOptions],
    ) -> Call[ModelStatus]:
        """Loads a version and answers once it is available, within an hour if `timeout` does not say otherwise.

        `source` is a folder, a .gguf file or a Hugging Face repository, as the server sees it. Not repeated, because a
        second try would find the first.
        """
        _check(options, CallOptions)
        request = models_pb2.LoadVersionRequest(name=name, source=source, adapter=adapter, revision=revision)
        if version is not None:
            request.version = version
        late: CallOptions = {"timeout": 3600.0, **options}
        answer = models_pb2.LoadVersionResponse
        return self._call("Models/LoadVersion", request, answer, _status, late, may_repeat=False)

    def unload_version(self, name: str, version: int, **options: Unpack[CallOptions]) -> Call[ModelStatus]:
        """Takes a version out of service; calls that already use it end on it. Not repeated."""
        _check(options, CallOptions)
        request, answer = models_pb2.UnloadVersionRequest(name=name, version=version), models_pb2.UnloadVersionResponse
        return self._call("Models/UnloadVersion", request, answer, _status, options, may_repeat=False)

    def set_label(
        self, name: str, label: str, version: int | None, **options: Unpack[CallOptions]
    ) -> Call[ModelStatus | None]:
        """Points a label at a version, or removes it with None. Answers where it points now."""
        _check(options, CallOptions)
        request = models_pb2.SetLabelRequest(name=name, label=label)
        if version is not None:
            request.version = version

        def convert(answer: models_pb2.SetLabelResponse) -> ModelStatus | None:
            return _status(answer) if answer.HasField("model") else None

        return self._call("Models/SetLabel", request, models_pb2.SetLabelResponse, convert, options)

    def set_traffic(
        self, name: str, shares: Mapping[str, int], **options: Unpack[CallOptions]
    ) -> Call[list[ModelStatus]]:
        """Splits the calls of a model that name neither version nor label between labels, by weight; none ends it."""
        _check(options, CallOptions)
        parts = [models_pb2.TrafficShare(label=label, weight=weight) for label, weight in shares.items()]
        request, answer = models_pb2.SetTrafficRequest(name=name, shares=parts), models_pb2.SetTrafficResponse
        return self._call("Models/SetTraffic", request, answer, _statuses, options)

    def watch_models(self, name: str = "", *, timeout: float | None = None) -> Call[ModelStatus]:
        """The present state of every version of a model (empty: of all), then every change, without end."""
        request = models_pb2.WatchModelsRequest(name=name)
        return Call("/plumb.v1.Models/WatchModels", request, models_pb2.WatchModelsResponse, _status, timeout)

    def health(self, service: str = "", **options: Unpack[CallOptions]) -> Call[Health]:
        """The health of a service, one of `SERVICES`, or of the whole server. Not repeated: to be away is an answer."""
        _check(options, CallOptions)

        def convert(answer: wire_pb2.HealthCheckResponse) -> Health:
            return Health[wire_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)]

        request, answer = wire_pb2.HealthCheckRequest(service=service), wire_pb2.HealthCheckResponse
        return Call("/grpc.health.v1.Health/Check", request, answer, convert, self._timeout(options), may_repeat=False)

    def scoring(
        self,
        items: Any,
        on_error: OnError,
        *,
        objective: Objective | None = None,
        per_token: bool = False,
        batch_size: int | None = None,
        concurrency: int | None = None,
        **options: Unpack[InputOptions],
    ) -> Scoring:
        """How `items` are cut into calls, and what becomes of these."""
        _check(options, InputOptions)
        _listed("items", items)
        if isinstance(items, tuple) and len(items) == 2 and all(isinstance(item, str) for item in items):
            raise TypeError("items is a list: of one pair [(prompt, response)], of two texts [text, text]")
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error is `raise` or `return`, not {on_error!r}")
        template = preference_pb2.ScoreRequest(
            model=self._model(options),
            text=_text(options),
            objective=_word("objective", inputs.OBJECTIVES, objective),
            per_token=per_token,
            # Where calls are split between versions, one id keeps all calls of these items with one version.
            request_id=options.get("request_id") or uuid4().hex,
            priority=_word("priority", inputs.PRIORITIES, options.get("priority")),
        )
        batch_size = self._options.batch_size if batch_size is None else batch_size
        concurrency = self._options.concurrency if concurrency is None else concurrency
        if batch_size < 1 or concurrency < 1:
            raise ValueError("batch_size and concurrency must be at least 1")
        # What fits into one call needs nobody beside it.
        if isinstance(items, Sized) and len(items) <= batch_size:
            concurrency = 1
        return Scoring(template, on_error, batch_size, concurrency, self._timeout(options))

    def _call(
        self,
        method: str,
        request: Any,
        answer: type[Any],
        convert: Callable[[Any], A],
        options: Any,
        *,
        may_repeat: bool = True,
    ) -> Call[A]:
        return Call(f"/plumb.v1.{method}", request, answer, convert, self._timeout(options), may_repeat)

    def _timeout(self, options: Any) -> float | None:
        timeout: float | None = options.get("timeout", self._options.timeout)
        return timeout

    def _model(self, options: Any) -> common_pb2.ModelSpec:
        name = options.get("model")
        name = self._options.model if name is None else name
        return _spec(name, options.get("version"), options.get("label"))


@dataclass(frozen=True)
class Batch:
    """Items of one call, of which the first has the index `first` among all. One that cannot be sent is its error."""

    first: int
    items: list[common_pb2.Input | PlumbError]

    def parts(self, size: int) -> list[Batch]:
        """Its items in batches of at most this size."""
        return [Batch(self.first + i, self.items[i : i + size]) for i in range(0, len(self.items), size)]

    def away(self, found: list[Score | PlumbError]) -> list[Batch]:
        """Batches of the items for which something was not there that may be there again."""
        return [part for part, its in zip(self.parts(1), found, strict=True) if isinstance(its, UnavailableError)]


@dataclass
class Scoring:
    """Many items, in calls of at most `batch_size`, of which at most `concurrency` are in flight."""

    template: preference_pb2.ScoreRequest
    on_error: OnError
    batch_size: int
    """Becomes less when the server takes fewer."""
    concurrency: int
    timeout: float | None

    def call(self, batch: Batch) -> Call[list[Score | PlumbError]]:
        """The call of a batch, which answers a score or an error for every item."""
        # The server has an error for the empty input that stands where an item cannot be sent.
        items = [common_pb2.Input() if isinstance(item, PlumbError) else item for item in batch.items]
        request = preference_pb2.ScoreRequest(items=items)
        request.MergeFrom(self.template)

        def convert(answer: preference_pb2.ScoreResponse) -> list[Score | PlumbError]:
            found = results.scores(answer, len(batch.items), batch.first)
            return [own if isinstance(own, PlumbError) else its for own, its in zip(batch.items, found, strict=True)]

        return Call("/plumb.v1.Preference/Score", request, preference_pb2.ScoreResponse, convert, self.timeout)

    def parts(self, error: PlumbError, batch: Batch, spent: float) -> list[Batch]:
        """The batch in smaller ones, if these may succeed where it failed after so many seconds; else nothing."""
        half = len(batch.items) // 2
        if half == 0:
            return []
        if any(violation.field == "items" for violation in error.details):
            # Not much less: it may have been long texts, which those that follow are not.
            self.batch_size = min(self.batch_size, max(half, 8))
            return batch.parts(half)
        # The server says at once what is too much for the deadline, even if it did nothing else.
        if error.code == grpc.StatusCode.DEADLINE_EXCEEDED and (self.timeout is None or spent < self.timeout / 2):
            return batch.parts(half)
        # A call whose items all fail by the same code fails as the first one does. The others have reasons too.
        return batch.parts(1) if self.on_error == "return" and _is_of_items(error) else []

    def failed(self, error: PlumbError, batch: Batch) -> list[Score | PlumbError]:
        """The call's failure as that of its items, where it says something about them; raises it if the next call
        would meet it too."""
        passing = error.code in (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.DEADLINE_EXCEEDED,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.OUT_OF_RANGE,
        )
        if not (passing or _is_of_items(error)):
            raise error
        return [
            item if isinstance(item, PlumbError) else error.of_item(batch.first + i)
            for i, item in enumerate(batch.items)
        ]

    def said(self, result: Score | PlumbError) -> Any:
        """The result as was asked for: an error is raised or returned."""
        if self.on_error == "raise" and isinstance(result, PlumbError):
            raise result
        return result


def _is_of_items(error: PlumbError) -> bool:
    return any(violation.field == "items" or violation.field.startswith("items[") for violation in error.details)


@dataclass
class Cutter:
    """Cuts a stream of items into batches."""

    scoring: Scoring
    _first: int = 0
    _items: list[common_pb2.Input | PlumbError] = field(default_factory=list)

    def push(self, item: Item) -> Batch | None:
        """Takes an item; answers a batch that is full by it."""
        try:
            self._items.append(inputs.item(item))
        except (TypeError, ValueError) as error:
            index = self._first + len(self._items)
            if self.scoring.on_error == "raise":
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"item {index}: {error}") from None
            self._items.append(InvalidArgumentError(str(error), index=index))
        return self.rest() if len(self._items) >= self.scoring.batch_size else None

    def cut(self, items: Iterable[Item]) -> Iterator[Batch]:
        """All batches of what is at hand."""
        full = (self.push(item) for item in items)
        yield from (batch for batch in full if batch is not None)
        last = self.rest()
        if last is not None:
            yield last

    def rest(self) -> Batch | None:
        """What has not filled a batch."""
        if not self._items:
            return None
        batch = Batch(self._first, self._items)
        self._first, self._items = self._first + len(self._items), []
        return batch


M = TypeVar("M", bound=Callable[..., Any])


def described(method: M, build: Callable[..., Any]) -> M:
    """Gives a client's method the name, the words and the parameters of the one that builds its call."""
    method.__name__, method.__doc__ = build.__name__, build.__doc__
    method.__qualname__ = f"Client.{build.__name__}"
    signature = inspect.signature(build)
    # What is answered is what the call answers.
    answer = str(signature.return_annotation).removeprefix("Call[").removesuffix("]")
    vars(method)["__signature__"] = signature.replace(return_annotation=answer)
    return method


def _check(options: Any, known: Any) -> None:
    unknown = options.keys() - known.__annotations__.keys()
    if unknown:
        raise TypeError(f"unexpected keyword argument: {', '.join(sorted(unknown))}")


def _listed(what: str, values: Any) -> None:
    # It would be taken for a list of its characters, keys or columns.
    if isinstance(values, (str, bytes, Mapping)) or hasattr(values, "columns"):
        raise TypeError(f"{what} is a list, not a {type(values).__name__}")


def _given(options: Any, names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if options.get(name) is not None}


def _lists(given: dict[str, Any], name: str) -> dict[str, Any]:
    # As in Transformers, a string is a list of one; it would be taken for one of its characters.
    return {**given, name: [given[name]]} if isinstance(given.get(name), str) else given


def _word(what: str, words: dict[str, Any], word: str | None) -> Any:
    if word is None:
        return 0
    if word not in words:
        raise ValueError(f"{what} is one of {', '.join(words)}, not {word!r}")
    return words[word]


def _spec(name: str | None, version: int | None, label: str | None) -> common_pb2.ModelSpec:
    if version is not None and label is not None:
        raise ValueError("a model has a version or a label, not both")
    spec = common_pb2.ModelSpec(name=name or "")
    if version is not None:
        spec.version = version
    elif label is not None:
        spec.label = label
    return spec


def _text(options: Any) -> common_pb2.TextOptions:
    text = common_pb2.TextOptions(
        chat_format=_word("chat_format", inputs.CHAT_FORMATS, options.get("chat_format")),
        hhh_prompt=_word("hhh_prompt", inputs.HHH_PROMPTS, options.get("hhh_prompt")),
        truncation=_word("truncation", inputs.TRUNCATIONS, options.get("truncation")),
    )
    if options.get("max_tokens") is not None:
        text.max_tokens = options["max_tokens"]
    return text


def _status(answer: Any) -> ModelStatus:
    return results.status(answer.model)


def _statuses(answer: Any) -> list[ModelStatus]:
    return [results.status(model) for model in answer.models]
