from . import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ScoreRequest(_message.Message):
    __slots__ = ("model", "items", "text", "objective", "per_token", "request_id", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelSpec
    items: _containers.RepeatedCompositeFieldContainer[_common_pb2.Input]
    text: _common_pb2.TextOptions
    objective: _common_pb2.Objective
    per_token: bool
    request_id: str
    priority: _common_pb2.Priority
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelSpec, _Mapping]] = ..., items: _Optional[_Iterable[_Union[_common_pb2.Input, _Mapping]]] = ..., text: _Optional[_Union[_common_pb2.TextOptions, _Mapping]] = ..., objective: _Optional[_Union[_common_pb2.Objective, str]] = ..., per_token: bool = ..., request_id: _Optional[str] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("model", "results", "timings", "request_id", "error")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelIdentity
    results: _containers.RepeatedCompositeFieldContainer[ScoreResult]
    timings: _common_pb2.Timings
    request_id: str
    error: _common_pb2.ItemError
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., results: _Optional[_Iterable[_Union[ScoreResult, _Mapping]]] = ..., timings: _Optional[_Union[_common_pb2.Timings, _Mapping]] = ..., request_id: _Optional[str] = ..., error: _Optional[_Union[_common_pb2.ItemError, _Mapping]] = ...) -> None: ...

class ScoreResult(_message.Message):
    __slots__ = ("score", "error")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    score: Score
    error: _common_pb2.ItemError
    def __init__(self, score: _Optional[_Union[Score, _Mapping]] = ..., error: _Optional[_Union[_common_pb2.ItemError, _Mapping]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("reward", "input_tokens", "cached_tokens", "truncated", "log_probs", "tokens")
    REWARD_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    reward: float
    input_tokens: int
    cached_tokens: int
    truncated: bool
    log_probs: LogProbs
    tokens: _containers.RepeatedCompositeFieldContainer[TokenValue]
    def __init__(self, reward: _Optional[float] = ..., input_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., truncated: bool = ..., log_probs: _Optional[_Union[LogProbs, _Mapping]] = ..., tokens: _Optional[_Iterable[_Union[TokenValue, _Mapping]]] = ...) -> None: ...

class LogProbs(_message.Message):
    __slots__ = ("sum", "mean", "response_tokens", "unconditional_sum", "greedy")
    SUM_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNCONDITIONAL_SUM_FIELD_NUMBER: _ClassVar[int]
    GREEDY_FIELD_NUMBER: _ClassVar[int]
    sum: float
    mean: float
    response_tokens: int
    unconditional_sum: float
    greedy: bool
    def __init__(self, sum: _Optional[float] = ..., mean: _Optional[float] = ..., response_tokens: _Optional[int] = ..., unconditional_sum: _Optional[float] = ..., greedy: bool = ...) -> None: ...

class TokenValue(_message.Message):
    __slots__ = ("id", "text", "value")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    value: float
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class RankRequest(_message.Message):
    __slots__ = ("model", "prompt", "candidates", "text", "objective", "request_id", "priority")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelSpec
    prompt: _common_pb2.Input
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    text: _common_pb2.TextOptions
    objective: _common_pb2.Objective
    request_id: str
    priority: _common_pb2.Priority
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelSpec, _Mapping]] = ..., prompt: _Optional[_Union[_common_pb2.Input, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., text: _Optional[_Union[_common_pb2.TextOptions, _Mapping]] = ..., objective: _Optional[_Union[_common_pb2.Objective, str]] = ..., request_id: _Optional[str] = ..., priority: _Optional[_Union[_common_pb2.Priority, str]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _common_pb2.TokenIds
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[_common_pb2.TokenIds, _Mapping]] = ...) -> None: ...

class RankResponse(_message.Message):
    __slots__ = ("model", "ranked", "timings", "request_id")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RANKED_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    model: _common_pb2.ModelIdentity
    ranked: _containers.RepeatedCompositeFieldContainer[Ranked]
    timings: _common_pb2.Timings
    request_id: str
    def __init__(self, model: _Optional[_Union[_common_pb2.ModelIdentity, _Mapping]] = ..., ranked: _Optional[_Iterable[_Union[Ranked, _Mapping]]] = ..., timings: _Optional[_Union[_common_pb2.Timings, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Ranked(_message.Message):
    __slots__ = ("index", "rank", "score", "margin", "probability", "error")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    index: int
    rank: int
    score: Score
    margin: float
    probability: float
    error: _common_pb2.ItemError
    def __init__(self, index: _Optional[int] = ..., rank: _Optional[int] = ..., score: _Optional[_Union[Score, _Mapping]] = ..., margin: _Optional[float] = ..., probability: _Optional[float] = ..., error: _Optional[_Union[_common_pb2.ItemError, _Mapping]] = ...) -> None: ...
