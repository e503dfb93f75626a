"""Answers, with the names of the contract (`proto/plumb/v1`), and how its messages become them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from ._proto import common_pb2, generation_pb2, models_pb2, preference_pb2, tokens_pb2
from .errors import InternalError, PlumbError, of_item

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelIdentity:
    """The model that answered."""

    name: str
    version: int
    weights_digest: str
    """sha256 of the weights as served: the same digest means the same scores."""


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in nanoseconds."""

    total_ns: int = 0
    tokenize_ns: int = 0
    queue_ns: int = 0
    inference_ns: int = 0


@dataclass(frozen=True)
class LogProbs:
    """A language model's log-probabilities of a response, in nats."""

    sum: float
    mean: float
    response_tokens: int
    unconditional_sum: float | None = None
    """With the query left out; only for mutual information."""
    greedy: bool = False
    """Whether greedy decoding gives the response; of equally likely tokens it takes the one with the lowest id."""


@dataclass(frozen=True)
class TokenValue:
    """A reward or log-probability that belongs to a token."""

    id: int
    text: str
    value: float


@dataclass(frozen=True)
class Score:
    """A text's score."""

    reward: float
    """Preference model: the raw f32 logit at the last token. Language model: the objective's value in nats."""
    input_tokens: int
    cached_tokens: int = field(compare=False)
    """Of the input's tokens, those whose state was already computed."""
    truncated: bool
    model: ModelIdentity
    log_probs: LogProbs | None = None
    """Language model: the parts of its score."""
    tokens: tuple[TokenValue, ...] = ()
    """With `per_token`: preference model, the head's value at every input token; language model, the log-probability
    of every response token."""
    timings: Timings = field(default_factory=Timings, compare=False, repr=False)
    """Those of the call that the item was in."""


@dataclass(frozen=True)
class Ranked:
    """A candidate's place."""

    index: int
    """Index of the candidate in the request."""
    rank: int
    """1 for the best; 0: the candidate has no score."""
    score: Score | None
    margin: float
    """Reward minus the best reward."""
    probability: float
    """sigmoid(margin): that of being preferred to the best."""
    error: PlumbError | None = None
    """Why there is no score."""


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first; those without a score come last."""

    ranked: tuple[Ranked, ...]
    model: ModelIdentity
    timings: Timings = field(default_factory=Timings, compare=False, repr=False)
    request_id: str = ""

    @property
    def best(self) -> Ranked:
        """The best candidate; raises the error of the first if none has a score."""
        first = self.ranked[0]
        if first.score is None:
            raise first.error or InternalError("no candidate has a score")
        return first


class FinishReason(str, Enum):
    """Why a sample ended."""

    UNSPECIFIED = "unspecified"
    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True)
class SampleEnd:
    """The end of a sample."""

    finish_reason: FinishReason
    new_tokens: int
    sum_log_prob: float
    """Of the drawn tokens under the model's own distribution, in nats."""
    reward: float | None = None
    """With `best_of`: the ranker's reward of prompt and sample."""


@dataclass(frozen=True)
class Piece:
    """A piece of generated text."""

    index: int
    """Which of the n samples it belongs to; with `best_of` 0 is the best."""
    text: str
    token_ids: tuple[int, ...]
    """May run ahead of the text while a character or a stop string is incomplete."""
    end: SampleEnd | None = None
    """In the last piece of a sample."""


@dataclass(frozen=True)
class Sample:
    """A whole sample."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    new_tokens: int
    sum_log_prob: float
    reward: float | None = None


@dataclass(frozen=True)
class Generation:
    """All samples of a call."""

    samples: tuple[Sample, ...]
    model: ModelIdentity
    ranker: ModelIdentity | None
    prompt_tokens: int
    cached_tokens: int = field(compare=False)
    truncated: bool
    seed: int
    timings: Timings = field(default_factory=Timings, compare=False, repr=False)
    request_id: str = ""

    @property
    def text(self) -> str:
        """Text of the first sample; with `best_of` the best."""
        return self.samples[0].text


@dataclass(frozen=True)
class Token:
    """A token of a text."""

    id: int
    text: str
    special: bool
    start: int
    """First byte of the text that it stands for."""
    stop: int
    """One past the last."""


@dataclass(frozen=True)
class Rendered:
    """What a model would be fed."""

    text: str
    token_ids: tuple[int, ...]
    response_start: int
    response_end: int
    template_sha256: str
    truncated: bool
    model: ModelIdentity


class ModelKind(str, Enum):
    """What a model can do."""

    UNSPECIFIED = "unspecified"
    LANGUAGE = "language"
    PREFERENCE = "preference"


class ModelState(str, Enum):
    """Where a version is in its life."""

    UNSPECIFIED = "unspecified"
    START = "start"
    LOADING = "loading"
    WARMING = "warming"
    AVAILABLE = "available"
    DRAINING = "draining"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True)
class RewardNormalization:
    """A checkpoint's own normalisation: reward = (logit - mean) / std."""

    mean: float
    std: float


@dataclass(frozen=True)
class ModelDetails:
    """What was found in a checkpoint."""

    kind: ModelKind
    architecture: str
    source: str
    dtype: str
    parameters: int
    weight_bytes: int
    max_input_tokens: int
    vocab_size: int
    chat_template_sha256: str
    hhh_prompt: str
    reward_head: str
    normalization: RewardNormalization | None
    adapter: str


@dataclass(frozen=True)
class ModelStatus:
    """A version of a model."""

    model: ModelIdentity
    state: ModelState
    error: str
    labels: tuple[str, ...]
    is_default: bool
    details: ModelDetails | None
    """None until the weights are read."""
    traffic_weight: int


class Health(str, Enum):
    """The health of a server or of one of its services."""

    UNKNOWN = "unknown"
    SERVING = "serving"
    NOT_SERVING = "not_serving"
    SERVICE_UNKNOWN = "service_unknown"


def _enum(kind: Any, wire: Any, value: int) -> Any:
    """The member of the contract's value; what a later server adds is the first, which says that nothing is known."""
    prefix = wire.Name(0).removesuffix("UNSPECIFIED")
    name = wire.Name(value).removeprefix(prefix) if value in wire.values() else "UNSPECIFIED"
    return kind[name]


def identity(model: common_pb2.ModelIdentity) -> ModelIdentity:
    return ModelIdentity(model.name, model.version, model.weights_digest)


def timings(message: common_pb2.Timings) -> Timings:
    return Timings(message.total_ns, message.tokenize_ns, message.queue_ns, message.inference_ns)


def _optional(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _score(score: preference_pb2.Score, model: ModelIdentity, spent: Timings) -> Score:
    logs = None
    if score.HasField("log_probs"):
        parts = score.log_probs
        unconditional = _optional(parts, "unconditional_sum")
        logs = LogProbs(parts.sum, parts.mean, parts.response_tokens, unconditional, parts.greedy)
    return Score(
        reward=score.reward,
        input_tokens=score.input_tokens,
        cached_tokens=score.cached_tokens,
        truncated=score.truncated,
        model=model,
        log_probs=logs,
        tokens=tuple(TokenValue(token.id, token.text, token.value) for token in score.tokens),
        timings=spent,
    )


def scores(answer: preference_pb2.ScoreResponse, asked: int, first: int) -> list[Score | PlumbError]:
    """A score or an error for each of the `asked` items, of which the first has the index `first`."""
    if len(answer.results) != asked:
        raise InternalError(
            f"the server's answer does not fit the request: {len(answer.results)} results, {asked} items"
        )
    model, spent = identity(answer.model), timings(answer.timings)

    def one(index: int, result: preference_pb2.ScoreResult) -> Score | PlumbError:
        match result.WhichOneof("outcome"):
            case "score":
                return _score(result.score, model, spent)
            case "error":
                return of_item(result.error, index)
        return InternalError("the server sent neither a score nor an error for this item", index=index)

    return [one(first + i, result) for i, result in enumerate(answer.results)]


class Versions:
    """Warns when scores that are compared with each other come from several versions, which is no comparison."""

    def __init__(self) -> None:
        self._seen: set[ModelIdentity] = set()

    def see(self, results: Iterable[Score | PlumbError]) -> None:
        """Looks at more of these scores."""
        for model in {result.model for result in results if isinstance(result, Score)} - self._seen:
            if self._seen:
                said = " and ".join(f"{m.name} version {m.version} ({m.weights_digest[:12]})" for m in self._seen)
                _log.warning("rewards of %s and now of version %d (%s)", said, model.version, model.weights_digest[:12])
            self._seen.add(model)


def ranking(answer: preference_pb2.RankResponse, asked: int) -> Ranking:
    if sorted(ranked.index for ranked in answer.ranked) != list(range(asked)):
        raise InternalError(
            f"the server's answer does not fit the request: not one place for each of {asked} candidates"
        )
    model, spent = identity(answer.model), timings(answer.timings)

    def one(ranked: preference_pb2.Ranked) -> Ranked:
        score = _score(ranked.score, model, spent) if ranked.HasField("score") else None
        error = of_item(ranked.error, ranked.index) if ranked.HasField("error") else None
        return Ranked(ranked.index, ranked.rank, score, ranked.margin, ranked.probability, error)

    return Ranking(tuple(one(ranked) for ranked in answer.ranked), model, spent, answer.request_id)


def piece(message: generation_pb2.GenerateResponse) -> Piece:
    end = None
    if message.HasField("end"):
        last = message.end
        reason = _enum(FinishReason, generation_pb2.FinishReason, last.finish_reason)
        end = SampleEnd(reason, last.new_tokens, last.sum_log_prob, _optional(last, "reward"))
    return Piece(message.index, message.text, tuple(message.token_ids), end)


class Collector:
    """Puts the pieces of a stream together."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[Piece]] = {}
        self._model: ModelIdentity | None = None
        self._ranker: ModelIdentity | None = None
        self._summary: generation_pb2.GenerateSummary | None = None

    def add(self, message: generation_pb2.GenerateResponse) -> Piece | None:
        """The message's piece of text, if it has one."""
        if message.HasField("model"):
            self._model = identity(message.model)
        if message.HasField("ranker"):
            self._ranker = identity(message.ranker)
        if message.HasField("summary"):
            self._summary = message.summary
        if not (message.text or message.token_ids or message.HasField("end")):
            return None
        part = piece(message)
        self._pieces.setdefault(part.index, []).append(part)
        return part

    def result(self) -> Generation:
        """The whole answer; raises what a stream lacks that has come to its end."""
        summary = self._summary
        if summary is None or self._model is None:
            raise InternalError("the stream ended before its summary")
        return Generation(
            samples=tuple(_sample(self._pieces[index]) for index in sorted(self._pieces)),
            model=self._model,
            ranker=self._ranker,
            prompt_tokens=summary.prompt_tokens,
            cached_tokens=summary.cached_tokens,
            truncated=summary.truncated,
            seed=summary.seed,
            timings=timings(summary.timings),
            request_id=summary.request_id,
        )


def _sample(pieces: list[Piece]) -> Sample:
    end = pieces[-1].end
    if end is None:
        raise InternalError("a sample has no end")
    return Sample(
        text="".join(part.text for part in pieces),
        token_ids=tuple(token for part in pieces for token in part.token_ids),
        finish_reason=end.finish_reason,
        new_tokens=end.new_tokens,
        sum_log_prob=end.sum_log_prob,
        reward=end.reward,
    )


def tokenized(answer: tokens_pb2.TokenizeResponse, asked: int) -> list[tuple[Token, ...]]:
    if len(answer.tokenized) != asked:
        raise InternalError(f"the server's answer does not fit the request: {len(answer.tokenized)} of {asked} texts")
    return [tuple(Token(t.id, t.text, t.special, t.start, t.stop) for t in text.tokens) for text in answer.tokenized]


def rendered(answer: tokens_pb2.RenderResponse) -> Rendered:
    return Rendered(
        text=answer.text,
        token_ids=tuple(answer.token_ids),
        response_start=answer.response_start,
        response_end=answer.response_end,
        template_sha256=answer.template_sha256,
        truncated=answer.truncated,
        model=identity(answer.model),
    )


def status(message: models_pb2.ModelStatus) -> ModelStatus:
    return ModelStatus(
        model=identity(message.model),
        state=_enum(ModelState, models_pb2.ModelState, message.state),
        error=message.error,
        labels=tuple(message.labels),
        is_default=message.is_default,
        details=_details(message.details) if message.HasField("details") else None,
        traffic_weight=message.traffic_weight,
    )


def _details(message: models_pb2.ModelDetails) -> ModelDetails:
    norm = _optional(message, "normalization")
    plain = ("architecture", "source", "dtype", "parameters", "weight_bytes", "max_input_tokens", "vocab_size")
    return ModelDetails(
        kind=_enum(ModelKind, models_pb2.ModelKind, message.kind),
        **{name: getattr(message, name) for name in plain},
        chat_template_sha256=message.chat_template_sha256,
        hhh_prompt=message.hhh_prompt,
        reward_head=message.reward_head,
        normalization=None if norm is None else RewardNormalization(norm.mean, norm.std),
        adapter=message.adapter,
    )
