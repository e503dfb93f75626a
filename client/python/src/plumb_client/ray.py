"""Scores of Ray data sets: a pool of actors, each with a client, over any number of servers.

    ds = ray.data.read_parquet("s3://texts/")
    score_ray_dataset(ds, ["http://replica-1:50051", "http://replica-2:50051"], actors=16).write_parquet("s3://scored/")

Columns are those of `plumb_client.data`. Data streams from the source to the sink, and Ray computes the rows of a dead
actor again. The package's README says what a billion rows take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from .client import Client
from .data import _Table
from .results import Versions

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._calls import OnError
    from .inputs import ScoreOptions

D = TypeVar("D")


def score_ray_dataset(
    dataset: D,
    target: str | Sequence[str] | Client | None = None,
    *,
    actors: int | tuple[int, int] = 2,
    rows: int = 512,
    num_cpus: float = 0.25,
    columns: Mapping[str, str] | None = None,
    split_turns: bool = False,
    on_error: OnError = "raise",
    **options: Unpack[ScoreOptions],
) -> D:
    """A `ray.data.Dataset` with the columns that `score_dataset` adds, computed when it is read or written.

    Args:
        target: Addresses as a `Client` takes them, asked as `Client.patient` does, or a client, which also has keys,
            deadlines and retries.
        actors: How many, or the least and the most.
        rows: Rows of a batch, which an actor's client sends in calls of `batch_size`, `concurrency` at a time.
        num_cpus: CPUs that Ray sets aside for an actor, which mostly waits.
        columns: Names of the columns where they are others, such as `{"response": "answer"}`.
        split_turns: Read `Human:` and `Assistant:` markers in strings as turns of a conversation.
        on_error: With `return`, a row that cannot be scored has nulls and an `error`; otherwise it fails the job.
        options: Those of `Client.score`.
    """
    from ray.data import ActorPoolStrategy

    client = target if isinstance(target, Client) else Client.patient(target)
    least, most = (actors, actors) if isinstance(actors, int) else actors
    source: Any = dataset
    scored: D = source.map_batches(
        Scorer,
        fn_constructor_args=(client,),
        fn_constructor_kwargs={
            "columns": columns,
            "split_turns": split_turns,
            "on_error": on_error,
            # One for all actors: where calls are split between versions, all rows go to the same one.
            "request_id": uuid4().hex,
            **options,
        },
        compute=ActorPoolStrategy(min_size=least, max_size=most),
        batch_size=rows,
        batch_format="pyarrow",
        num_cpus=num_cpus,
    )
    return scored


class Scorer:
    """What an actor is, for `map_batches` with options of one's own; `batch_format` is `pyarrow`."""

    def __init__(
        self,
        client: Client,
        *,
        columns: Mapping[str, str] | None = None,
        split_turns: bool = False,
        on_error: OnError = "raise",
        **options: Unpack[ScoreOptions],
    ) -> None:
        """See `score_ray_dataset`."""
        self._client, self._columns, self._split_turns = client, columns or {}, split_turns
        self._on_error, self._options, self._versions = on_error, options, Versions()

    def __call__(self, batch: Any) -> Any:
        """The table with the columns of its scores."""
        import pyarrow as pa

        table = _Table.of(batch.column_names, self._columns, self._split_turns)
        read = {name: batch.column(name).to_pylist() for name in table.names}
        added = table.score(read, self._client, self._on_error, self._options, self._versions)
        batch = batch.drop_columns([name for name in added if name in batch.column_names])
        for name, values in added.items():
            batch = batch.append_column(name, pa.array(values, pa.type_for_alias(_Table.kind(name))))
        return batch
