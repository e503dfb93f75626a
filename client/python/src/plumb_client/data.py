"""Scores of tables: pandas data frames and Hugging Face data sets.

A table has the columns `chosen` and `rejected`, with or without `prompt`; or `prompt` and `response`; or `messages`; or
`text`: the first of these that there are and that have the columns which `columns` names. A prompt is a user's words or
turns, a side of a pair continues it or is a whole conversation.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from . import transcript
from ._calls import OnError
from .client import Client
from .errors import PlumbError
from .inputs import Item, ScoreOptions
from .results import Score, Versions

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Unpack

D = TypeVar("D")

_FORMS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("prompt", "response"), ("messages",), ("text",))


def score_frame(
    frame: pd.DataFrame,
    client: Client,
    *,
    columns: Mapping[str, str] | None = None,
    split_turns: bool = False,
    progress: bool = True,
    on_error: OnError = "raise",
    **options: Unpack[ScoreOptions],
) -> pd.DataFrame:
    """A copy of a frame with columns for the scores.

    For pairs these are `chosen_reward`, `rejected_reward` and `margin`, otherwise `reward` and `input_tokens`; with
    `on_error="return"` also `error`, and the values of a row that failed are missing (`pandas.NA`).

    Args:
        columns: Names of the frame's columns where they are others, such as `{"response": "answer"}`.
        split_turns: Read `Human:` and `Assistant:` markers in strings as turns of a conversation.
        progress: Show a bar, where tqdm is installed.
    """
    import pandas as pd

    table = _Table.of(list(frame.columns), columns or {}, split_turns)
    rows = frame[list(table.names)].itertuples(index=False, name=None)
    items = (item for row in rows for item in table.items(row))
    scored = client.score_stream(items, on_error=on_error, **options)
    results = list(_bar(scored, len(frame) * table.sides, progress))
    Versions().see(results)
    kinds = {"input_tokens": "Int64", "error": "string"}
    added = {
        name: pd.array(values, dtype=kinds.get(name, "Float64"))
        for name, values in table.columns(results, on_error).items()
    }
    return frame.assign(**added)


def score_dataset(
    dataset: D,
    client: Client,
    *,
    columns: Mapping[str, str] | None = None,
    split_turns: bool = False,
    rows: int = 512,
    on_error: OnError = "raise",
    **options: Unpack[ScoreOptions],
) -> D:
    """A data set (`Dataset`, `IterableDataset` or a dictionary of these) with columns for the scores.

    Columns and options are those of `score_frame`; a value that is missing is null. `rows` are handed to the client at
    once. Nothing is taken from the cache of `datasets`, which cannot know which version a server serves, neither here
    nor in the steps that follow.
    """
    run, versions = uuid4().hex, Versions()
    named: ScoreOptions = {"request_id": run, **options}

    # The parameter makes the function another one in each run: later steps find what they cached by the steps before.
    def add(batch: dict[str, list[Any]], _run: str = run) -> dict[str, list[Any]]:
        return _Table.of(list(batch), columns or {}, split_turns).score(batch, client, on_error, named, versions)

    source: Any = dataset
    how: dict[str, Any] = {"batched": True, "batch_size": rows}
    split = next(iter(source.values())) if isinstance(source, dict) else source
    if split.features is not None:
        how["features"] = _features(
            split.features, _Table.of(list(split.features), columns or {}, split_turns), on_error
        )
    if hasattr(split, "cleanup_cache_files"):
        how |= {"load_from_cache_file": False, "desc": "scores"}
    scored: D = source.map(add, **how)
    return scored


def _features(known: Any, table: _Table, on_error: OnError) -> Any:
    """The columns' types, which cannot be learned from a first batch in which all values are missing."""
    from datasets import Features, Value

    return Features({**known, **{name: Value(_Table.kind(name)) for name in table.columns([], on_error)}})


@dataclass(frozen=True)
class PairAccuracy:
    """How often the chosen side has the higher reward. A tie counts half."""

    pairs: int
    ties: int
    failed: int
    """Pairs that have no two scores, which count for nothing."""
    accuracy: float
    """Share of the pairs, from 0 to 1; NaN of none."""
    low: float
    """Lower end of the 95 % Wilson interval."""
    high: float
    """Upper end."""
    mean_margin: float


def pair_accuracy(scored: Any) -> PairAccuracy:
    """Accuracy on pairs that `score_frame` or `score_dataset` has scored, or on any table with their columns."""
    margins = [
        chosen - rejected if _is_number(chosen) and _is_number(rejected) else None
        for chosen, rejected in zip(scored["chosen_reward"], scored["rejected_reward"], strict=True)
    ]
    known = [margin for margin in margins if margin is not None]
    n, ties = len(known), known.count(0.0)
    failed = len(margins) - n
    if n == 0:
        return PairAccuracy(0, 0, failed, math.nan, math.nan, math.nan, math.nan)
    share = (sum(margin > 0 for margin in known) + ties / 2) / n
    low, high = _wilson(share, n)
    return PairAccuracy(n, ties, failed, share, low, high, sum(known) / n)


@dataclass(frozen=True)
class _Table:
    """Which columns say what is scored."""

    form: tuple[str, ...]
    names: tuple[str, ...]
    split_turns: bool

    @classmethod
    def of(cls, present: Sequence[str], names: Mapping[str, str], split_turns: bool) -> _Table:
        known = {word for form in _FORMS for word in form}
        if not names.keys() <= known:
            raise ValueError(f"columns are named for {', '.join(sorted(known))}, not {', '.join(names.keys() - known)}")
        missing = [name for name in names.values() if name not in present]
        if missing:
            raise ValueError(f"the table has the columns {', '.join(map(str, present))}, not {', '.join(missing)}")
        for form in _FORMS:
            found = tuple(names.get(word, word) for word in form)
            # Who names a column wants it read.
            if names.keys() <= set(form) and all(name in present for name in found):
                return cls(form, found, split_turns)
        wanted = "; ".join(" and ".join(form) for form in _FORMS)
        raise ValueError(f"the table has the columns {', '.join(map(str, present))}, and needs one of: {wanted}")

    @property
    def sides(self) -> int:
        """Items in a row."""
        return 2 if "chosen" in self.form else 1

    def items(self, row: Sequence[Any]) -> list[Any]:
        """What a row asks to score; None, which is no item, of a row that lacks something."""
        try:
            match self.form:
                case ("prompt", "chosen", "rejected"):
                    return [self._side(row[0], row[1]), self._side(row[0], row[2])]
                case ("prompt", "response"):
                    return [[*self._prompt(row[0]), {"role": "assistant", "content": row[1]}]]
                case _:
                    return [self._words(words) for words in row]
        except (KeyError, TypeError):
            return [None] * self.sides

    def _side(self, prompt: Any, words: Any) -> Item:
        """A string, or turns that begin with the assistant's, continue the prompt; other turns are all there are."""
        if isinstance(words, str):
            return [*self._prompt(prompt), {"role": "assistant", "content": words}]
        turns = list(words)
        if turns and turns[0]["role"] == "assistant":
            return [*self._prompt(prompt), *turns]
        return turns

    def _prompt(self, prompt: Any) -> list[Mapping[str, str]]:
        if not isinstance(prompt, str):
            return list(prompt)
        return list(transcript.turns(prompt)) if self.split_turns else [{"role": "user", "content": prompt}]

    def _words(self, words: Any) -> Item:
        if isinstance(words, str):
            return transcript.turns(words) if self.split_turns else words
        return list(words)

    def score(
        self,
        batch: Mapping[str, Sequence[Any]],
        client: Client,
        on_error: OnError,
        options: ScoreOptions,
        versions: Versions,
    ) -> dict[str, list[Any]]:
        """The new columns of some rows, which are given by columns."""
        rows = zip(*(batch[name] for name in self.names), strict=True)
        items = [item for row in rows for item in self.items(row)]
        results = client.score(items, on_error=on_error, **options)
        versions.see(results)
        return self.columns(results, on_error)

    @staticmethod
    def kind(name: str) -> str:
        """The type of a new column, as pyarrow and datasets call it."""
        return {"input_tokens": "int64", "error": "string"}.get(name, "float64")

    def columns(self, results: Sequence[Score | PlumbError], on_error: OnError) -> dict[str, list[Any]]:
        """The new columns, of all rows' results."""
        scores = [result if isinstance(result, Score) else None for result in results]
        rewards = [score.reward if score else None for score in scores]
        added: dict[str, list[Any]]
        if self.sides == 2:
            chosen, rejected = rewards[0::2], rewards[1::2]
            margins = [None if c is None or r is None else c - r for c, r in zip(chosen, rejected, strict=True)]
            added = {"chosen_reward": chosen, "rejected_reward": rejected, "margin": margins}
        else:
            tokens = [score.input_tokens if score else None for score in scores]
            added = {"reward": rewards, "input_tokens": tokens}
        if on_error == "return":
            said = [f"{r.code.name}: {r.message}" if isinstance(r, PlumbError) else None for r in results]
            added["error"] = [_joined(said[i : i + self.sides]) for i in range(0, len(said), self.sides)]
        return added


def _joined(said: list[str | None]) -> str | None:
    return "; ".join(error for error in said if error is not None) or None


def _is_number(value: Any) -> bool:
    # Also those of numpy, and neither None nor pandas.NA.
    return isinstance(value, numbers.Real) and not math.isnan(value)


def _wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    return max(0.0, (centre - spread) / whole), min(1.0, (centre + spread) / whole)


def _bar(results: Iterator[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return results
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return results
    bar: Callable[..., Iterable[Any]] = tqdm
    return bar(results, total=total, desc="scores", unit="item")
