"""The client for asyncio, with the methods of `plumb_client.Client`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar, overload

import grpc
import grpc.aio

from ._base import Base
from ._calls import Batch, Call, Calls, Cutter, OnError, Scoring, described
from .errors import DeadlineExceededError, PlumbError, UnavailableError, of_rpc
from .inputs import GenerateOptions, Item, Prompt, ScoreOptions
from .results import Collector, Generation, Piece, Score
from .retry import Attempts, Waiting

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

A = TypeVar("A")
P = ParamSpec("P")

Items: TypeAlias = "Iterable[Item] | AsyncIterable[Item]"


def _answered(build: Callable[Concatenate[Calls, P], Call[A]]) -> Callable[Concatenate[Client, P], Awaitable[A]]:
    """The method that makes a call and waits for its answer."""

    async def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> A:
        return await self._answer(build(self._calls, *args, **kwargs))

    return described(method, build)


def _streamed(
    build: Callable[Concatenate[Calls, P], Call[A]],
) -> Callable[Concatenate[Client, P], AsyncGenerator[A, None]]:
    """The method that makes a call and answers messages as they come. Closing the iterator ends the call."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[A, None]:
        return self._messages(build(self._calls, *args, **kwargs))

    return described(method, build)


class Client(Base):
    """A client of one or several equal servers, for the tasks of an event loop. See `plumb_client.Client`."""

    _loop: asyncio.AbstractEventLoop | None = None

    rank = _answered(Calls.rank)
    tokenize = _answered(Calls.tokenize)
    render = _answered(Calls.render)
    models = _answered(Calls.models)
    model = _answered(Calls.model)
    load_version = _answered(Calls.load_version)
    unload_version = _answered(Calls.unload_version)
    set_label = _answered(Calls.set_label)
    set_traffic = _answered(Calls.set_traffic)
    watch_models = _streamed(Calls.watch_models)
    health = _answered(Calls.health)

    @overload
    async def score(
        self, items: Items, *, on_error: Literal["raise"] = "raise", **options: Unpack[ScoreOptions]
    ) -> list[Score]: ...
    @overload
    async def score(
        self, items: Items, *, on_error: Literal["return"], **options: Unpack[ScoreOptions]
    ) -> list[Score | PlumbError]: ...
    async def score(self, items: Items, *, on_error: OnError = "raise", **options: Unpack[ScoreOptions]) -> Any:
        """Scores any number of items, as `plumb_client.Client.score` does."""
        scoring = self._calls.scoring(items, on_error, **options)
        return [result async for result in self._scores(scoring, items)]

    @overload
    def score_stream(
        self, items: Items, *, on_error: Literal["raise"] = "raise", **options: Unpack[ScoreOptions]
    ) -> AsyncGenerator[Score, None]: ...
    @overload
    def score_stream(
        self, items: Items, *, on_error: Literal["return"], **options: Unpack[ScoreOptions]
    ) -> AsyncGenerator[Score | PlumbError, None]: ...
    def score_stream(
        self, items: Items, *, on_error: OnError = "raise", **options: Unpack[ScoreOptions]
    ) -> AsyncGenerator[Any, None]:
        """Scores items as they come, also from an asynchronous iterator, as `plumb_client.Client.score_stream` does."""
        scoring = self._calls.scoring(items, on_error, **options)
        return self._scores(scoring, items)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Samples text that follows a prompt and answers it whole. `GenerateOptions` has all options."""
        async with self.generate_stream(prompt, **options) as stream:
            return await stream.result()

    def generate_stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Samples text that follows a prompt and answers it as it comes."""
        return GenerationStream(self._messages(self._calls.generate(prompt, **options)))

    async def wait_ready(self, timeout: float | None = 60.0) -> None:
        """Waits until a server is serving; raises why none is when the time is over."""
        waiting = Waiting(timeout)
        while True:
            try:
                pause = waiting.pause(await self.health(timeout=waiting.remaining()))
            except (UnavailableError, DeadlineExceededError) as error:
                pause = waiting.pause(error)
            if pause is None:
                return
            await asyncio.sleep(pause)

    async def close(self) -> None:
        """Closes the connections. Calls after that make new ones."""
        channels, self._channels = self._channels or [], None
        for channel in channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _channel(self, turn: int) -> grpc.aio.Channel:
        # Connections belong to the loop that made them; another one, as of a second `asyncio.run`, makes its own.
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._channels = loop, None
        channels: list[grpc.aio.Channel] = self._pool(grpc.aio.insecure_channel, grpc.aio.secure_channel)
        return channels[turn % len(channels)]

    async def _answer(self, call: Call[A]) -> A:
        """Makes a call that has one answer: deadline, tries, pauses."""
        attempts, turn = Attempts(self._options.retry, call.timeout), next(self._turns)
        while True:
            stub = self._channel(turn + attempts.made).unary_unary(**call.stub())
            attempts.made += 1
            try:
                return call.convert(await stub(call.request, timeout=attempts.remaining(), metadata=self._metadata))
            except grpc.RpcError as error:
                pause = attempts.pause(of_rpc(error, attempts.made), call.may_repeat)
            await asyncio.sleep(pause)

    async def _messages(self, call: Call[A]) -> AsyncGenerator[A, None]:
        """Makes a call that has many answers. It is tried again until the first one comes, not after it."""
        attempts, turn = Attempts(self._options.retry, call.timeout), next(self._turns)
        while True:
            stub = self._channel(turn + attempts.made).unary_stream(**call.stub())
            rpc = stub(call.request, timeout=attempts.remaining(), metadata=self._metadata)
            attempts.made += 1
            opened = False
            try:
                async for message in rpc:
                    opened = True
                    yield call.convert(message)
                return
            except grpc.RpcError as error:
                pause = attempts.pause(of_rpc(error, attempts.made), call.may_repeat and not opened)
            finally:
                rpc.cancel()
            await asyncio.sleep(pause)

    async def _scores(self, scoring: Scoring, items: Items) -> AsyncGenerator[Any, None]:
        async with aclosing(self._window(scoring, items)) as window:
            async for results in window:
                for result in results:
                    yield scoring.said(result)

    async def _window(self, scoring: Scoring, items: Items) -> AsyncGenerator[list[Score | PlumbError], None]:
        """The batches' results in order, with a bounded number of calls in flight."""
        window: deque[asyncio.Task[list[Score | PlumbError]]] = deque()
        try:
            async for batch in _batches(Cutter(scoring), items):
                window.append(asyncio.create_task(self._batch(scoring, batch)))
                while window and (len(window) >= scoring.concurrency or window[0].done()):
                    yield await window.popleft()
            while window:
                yield await window.popleft()
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)

    async def _batch(self, scoring: Scoring, batch: Batch) -> list[Score | PlumbError]:
        began = time.monotonic()
        try:
            found = await self._answer(scoring.call(batch))
        except PlumbError as error:
            parts = scoring.parts(error, batch, time.monotonic() - began)
            return [r for part in parts for r in await self._batch(scoring, part)] or scoring.failed(error, batch)
        with suppress(PlumbError):
            for part in batch.away(found):
                [found[part.first - batch.first]] = await self._answer(scoring.call(part))
        return found


class GenerationStream(AsyncIterator[Piece]):
    """Generated text as it comes. Closing it ends the call."""

    def __init__(self, messages: AsyncGenerator[Any, None]) -> None:
        self._messages, self._collector = messages, Collector()

    async def __anext__(self) -> Piece:
        async for message in self._messages:
            piece = self._collector.add(message)
            if piece is not None:
                return piece
        raise StopAsyncIteration

    async def result(self) -> Generation:
        """All of the text, read to its end."""
        async for _ in self:
            pass
        return self._collector.result()

    async def close(self) -> None:
        """Ends the call."""
        await self._messages.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _batches(cutter: Cutter, items: Items) -> AsyncIterator[Batch]:
    if not isinstance(items, AsyncIterable):
        for batch in cutter.cut(items):
            yield batch
        return
    async for item in items:
        full = cutter.push(item)
        if full is not None:
            yield full
    rest = cutter.rest()
    if rest is not None:
        yield rest
