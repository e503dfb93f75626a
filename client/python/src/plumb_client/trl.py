"""Rewards for TRL's trainers: `PlumbReward` is a reward function for GRPO, RLOO and online DPO.

    GRPOTrainer(model, reward_funcs=PlumbReward("http://127.0.0.1:50051", model="pm"), ...)

`AsyncPlumbReward` is the same for trainers that wait for several reward functions at once. Several models are several
reward functions, which the trainer weighs by `reward_weights`. Trainers that take a reward model instead, such as PPO,
take `plumb_client.reward_model.PlumbRewardModel`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from . import aio, transcript
from .client import Client
from .inputs import Item, ScoreOptions, Text
from .results import Score, Versions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._calls import OnError
    from .errors import PlumbError

Said: TypeAlias = "str | Sequence[Mapping[str, str]]"
"""A prompt or a completion: a string (TRL's standard format) or turns (its conversational format)."""

Strings: TypeAlias = Literal["text", "turns", "transcript"]

_log = logging.getLogger(__name__)


class _Reward:
    """What is scored, and what the scores say to a trainer."""

    _kind: Any = Client
    client: Any

    def __init__(
        self,
        target: str | Sequence[str] | Client | aio.Client | None = None,
        *,
        name: str | None = None,
        strings: Strings = "text",
        on_error: Literal["raise", "none"] = "raise",
        **options: Unpack[ScoreOptions],
    ) -> None:
        """Connects at the first call, in the process that makes it.

        Args:
            target: Addresses as a `Client` takes them, asked as `Client.patient` does, so that a training outlives a
                server's restart; or a client, which also has keys, deadlines and retries.
            name: What the trainer logs the rewards as; default: the model's name.
            strings: How strings are read. `text`: a completion continues its prompt's text, as it is. `turns`: the
                prompt is the user's turn, the completion the answer. `transcript`: the prompt has `Human:` and
                `Assistant:` markers, the completion ends its last turn. Prompts and completions that are turns are
                scored in the server's chat format.
            on_error: What becomes of a completion that cannot be scored, such as one that is too long: its error is
                raised, or it has no reward (None), with a warning. TRL sums a completion's rewards without those that
                are None, and takes none at all for 0. What fails the whole call is always raised.
            options: Those of `Client.score`, such as `model`, `label`, `truncation`, `chat_format`. Where neither
                version nor label is named, a version that is published meanwhile changes the rewards, with a warning.
        """
        for what, word, words in (
            ("strings", strings, ("text", "turns", "transcript")),
            ("on_error", on_error, ("raise", "none")),
        ):
            if word not in words:
                raise ValueError(f"{what} is one of {', '.join(words)}, not {word!r}")
        self.client = target if isinstance(target, self._kind) else self._kind.patient(target)
        self.__name__ = name or options.get("model") or "plumb"
        self._strings = strings
        self._on_error: OnError = "raise" if on_error == "raise" else "return"
        self._options = options
        self._versions = Versions()

    def _items(self, prompts: Sequence[Said], completions: Sequence[Said]) -> list[Item]:
        return [self._item(*both) for both in zip(prompts, completions, strict=True)]

    def _item(self, prompt: Said, completion: Said) -> Item:
        if not isinstance(completion, str):
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return [*turns, *completion]
        if not isinstance(prompt, str) or self._strings == "turns":
            return prompt, completion
        if self._strings == "text":
            return Text(prompt + completion)
        # Only the prompt's markers make turns: a policy does not speak for the user.
        turns = transcript.turns(prompt)
        begun = turns.pop()["content"] if turns and turns[-1]["role"] == "assistant" else ""
        space = prompt[len(prompt.rstrip()) :]
        return turns, (begun + space + completion).strip()

    def _rewards(self, results: Sequence[Score | PlumbError]) -> list[float | None]:
        self._versions.see(results)
        rewards = [result.reward if isinstance(result, Score) else None for result in results]
        failed = [result for result in results if not isinstance(result, Score)]
        if failed:
            _log.warning("%d of %d completions have no reward: %s", len(failed), len(results), failed[0])
        return rewards


class PlumbReward(_Reward):
    """A reward function: the preference model's rewards of completions, or a language model's scores."""

    client: Client

    def __call__(self, prompts: Sequence[Said], completions: Sequence[Said], **_: Any) -> list[float | None]:
        """A reward for every completion; further columns are passed over."""
        items = self._items(prompts, completions)
        return self._rewards(self.client.score(items, on_error=self._on_error, **self._options))


class AsyncPlumbReward(_Reward):
    """`PlumbReward` for trainers that await reward functions which are objects, as TRL's do from 1.14 on. A client that
    it is given is one of `plumb_client.aio`."""

    _kind = aio.Client
    client: aio.Client

    async def __call__(self, prompts: Sequence[Said], completions: Sequence[Said], **_: Any) -> list[float | None]:
        """A reward for every completion; further columns are passed over."""
        items = self._items(prompts, completions)
        return self._rewards(await self.client.score(items, on_error=self._on_error, **self._options))
