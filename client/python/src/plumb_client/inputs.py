"""What is scored or gone on with, in the forms in which it comes, as messages of the contract."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, Literal, TypeAlias, TypedDict

from ._proto import common_pb2, preference_pb2


@dataclass(frozen=True)
class Text:
    """A text that is tokenized as it is, special tokens added once."""

    text: str


@dataclass(frozen=True)
class TokenIds:
    """Token ids that are fed to the model as they are."""

    ids: Sequence[int]
    response_start: int | None = None
    """Where the response begins, which is what a language model's score counts; None: after the first token."""


Messages: TypeAlias = Sequence[Mapping[str, str]]
"""Turns, oldest first: `{"role": ..., "content": ...}`. Other keys are passed over, except for calls of tools, which
have no place in the contract."""

Prompt: TypeAlias = "str | Text | Messages | Sequence[int] | TokenIds"
"""What is answered: a user's words, turns, a raw text to go on with, or token ids."""

Item: TypeAlias = "str | Text | Messages | tuple[str | Messages, str] | Sequence[int] | TokenIds"
"""What is scored: a text as it is, turns whose last one is the response, a (prompt, response) pair, or token ids."""


def item(value: Item | Prompt, *, is_prompt: bool = False) -> common_pb2.Input:
    """An item as a message. A plain string is a text; of a prompt it is the user's turn."""
    if isinstance(value, str):
        return _conversation([_message("user", value)]) if is_prompt else common_pb2.Input(text=value)
    if isinstance(value, Text):
        return common_pb2.Input(text=value.text)
    if isinstance(value, TokenIds):
        ids = common_pb2.TokenIds(ids=[index(i) for i in value.ids])
        if value.response_start is not None:
            ids.response_start = value.response_start
        return common_pb2.Input(token_ids=ids)
    if isinstance(value, Iterable) and not isinstance(value, (bytes, Mapping)):
        parts: list[Any] = list(value)
        if parts and all(isinstance(part, Mapping) for part in parts):
            return _conversation(_turns(parts))
        # Also the integers of numpy and of torch.
        if parts and all(hasattr(part, "__index__") for part in parts):
            return item(TokenIds(parts))
        if isinstance(value, tuple) and len(parts) == 2 and not is_prompt:
            said, response = parts
            turns = [_message("user", said)] if isinstance(said, str) else _turns(said)
            return _conversation([*turns, _message("assistant", response)])
    raise TypeError(
        f"{_shown(value)} is none of: a text, turns with role and content, a (prompt, response) tuple, token ids"
    )


def candidate(value: str | Sequence[int] | TokenIds) -> preference_pb2.Candidate:
    """A response to be ranked."""
    if isinstance(value, str):
        return preference_pb2.Candidate(text=value)
    ids = value.ids if isinstance(value, TokenIds) else value
    return preference_pb2.Candidate(token_ids=common_pb2.TokenIds(ids=[index(i) for i in ids]))


def _turns(messages: Any) -> list[common_pb2.Message]:
    try:
        turns = [_message(turn["role"], turn["content"]) for turn in messages]
    except (KeyError, TypeError) as error:
        raise TypeError(f"{_shown(messages)} has a turn without role or content") from error
    if any(turn.get("tool_calls") for turn in messages):
        raise TypeError(f"{_shown(messages)} has a turn that calls tools, which cannot be sent")
    return turns


def _message(role: Any, content: Any) -> common_pb2.Message:
    if not isinstance(role, str) or not isinstance(content, str):
        raise TypeError(f"a turn is two strings, role and content, not {_shown(role)} and {_shown(content)}")
    return common_pb2.Message(role=role, content=content)


def _conversation(turns: list[common_pb2.Message]) -> common_pb2.Input:
    return common_pb2.Input(conversation=common_pb2.Conversation(messages=turns))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


ChatFormat: TypeAlias = Literal["template", "human-assistant"]
HhhPrompt: TypeAlias = Literal["none", "full", "short"]
Truncation: TypeAlias = Literal["refuse", "left", "right"]
Objective: TypeAlias = Literal["mean", "sum", "mutual-information"]
Priority: TypeAlias = Literal["low", "normal", "high"]

CHAT_FORMATS: dict[str, common_pb2.ChatFormat] = {
    "template": common_pb2.CHAT_FORMAT_TEMPLATE,
    "human-assistant": common_pb2.CHAT_FORMAT_HUMAN_ASSISTANT,
}
HHH_PROMPTS: dict[str, common_pb2.HhhPrompt] = {
    "none": common_pb2.HHH_PROMPT_NONE,
    "full": common_pb2.HHH_PROMPT_FULL,
    "short": common_pb2.HHH_PROMPT_SHORT,
}
TRUNCATIONS: dict[str, common_pb2.Truncation] = {
    "refuse": common_pb2.TRUNCATION_REFUSE,
    "left": common_pb2.TRUNCATION_LEFT,
    "right": common_pb2.TRUNCATION_RIGHT,
}
OBJECTIVES: dict[str, common_pb2.Objective] = {
    "mean": common_pb2.OBJECTIVE_MEAN_LOG_PROB,
    "sum": common_pb2.OBJECTIVE_SUM_LOG_PROB,
    "mutual-information": common_pb2.OBJECTIVE_MUTUAL_INFORMATION,
}
PRIORITIES: dict[str, common_pb2.Priority] = {
    "low": common_pb2.PRIORITY_LOW,
    "normal": common_pb2.PRIORITY_NORMAL,
    "high": common_pb2.PRIORITY_HIGH,
}


class CallOptions(TypedDict, total=False):
    """How a call is made."""

    timeout: float | None
    """Longest wait for the answer in seconds, all tries together; None waits for ever. Default: the client's."""
    request_id: str
    """Echoed in the answer and in the server's logs."""
    priority: Priority
    """How urgent the call is; default: normal."""


class ModelOptions(TypedDict, total=False):
    """Which model answers."""

    model: str | None
    """Its name; default: the client's, else the server's."""
    version: int | None
    """Its version; default: the one labelled stable, else the newest."""
    label: str | None
    """A label of its version, such as `canary`."""


class TextOptions(TypedDict, total=False):
    """How inputs become tokens."""

    chat_format: ChatFormat | None
    """How a conversation becomes text; default: the checkpoint's template, else human-assistant."""
    hhh_prompt: HhhPrompt | None
    """Whether the helpful, honest, harmless prompt stands in front; default: none."""
    truncation: Truncation | None
    """What to do with a text that is too long; default: the server's choice, usually refuse."""
    max_tokens: int | None
    """Longest text in tokens; default: the model's limit."""


class InputOptions(CallOptions, ModelOptions, TextOptions, total=False):
    """Which model answers, how inputs become its tokens, and how the call is made."""


class ScoreOptions(InputOptions, total=False):
    """How items are scored."""

    objective: Objective | None
    """How a language model's score is made, default: mean; a preference model ignores it."""
    per_token: bool
    """Also answer a value for every token."""
    batch_size: int | None
    """Most items in a call; default: the client's."""
    concurrency: int | None
    """Most calls in flight; default: the client's."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn, and when a sample ends."""

    temperature: float | None
    """0 takes the likeliest token; default: 1."""
    top_k: int | None
    """Keeps the k likeliest tokens."""
    top_p: float | None
    """Keeps the smallest set of tokens with at least this probability."""
    min_p: float | None
    """Drops tokens less likely than this share of the likeliest one."""
    repetition_penalty: float | None
    """Divides the repeated tokens' positive logits and multiplies their negative ones."""
    banned_strings: str | Sequence[str]
    """Strings that are never produced."""
    seed: int | None
    """Same seed, same request, same version: same text."""
    max_new_tokens: int | None
    """Most tokens to draw; default: the server's."""
    stop_strings: str | Sequence[str]
    """A sample ends before any of these."""
    ignore_eos: bool
    """Go on after an end-of-text token."""


class GenerateOptions(InputOptions, SamplingOptions, total=False):
    """How text is generated."""

    n: int | None
    """Samples to answer; default: 1."""
    best_of: int | None
    """Draw so many samples and answer the n best by a preference model."""
    ranker: str | None
    """That preference model; default: the server's."""
    ranker_version: int | None
    """Its version."""
    ranker_label: str | None
    """A label of its version."""
