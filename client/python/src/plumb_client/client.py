"""The client for programs that wait for their answers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

import grpc

from ._base import Base
from ._calls import Batch, Call, Calls, Cutter, OnError, Scoring, described
from .errors import CallCancelledError, DeadlineExceededError, PlumbError, UnavailableError, of_rpc
from .inputs import GenerateOptions, Item, Prompt, ScoreOptions
from .results import Collector, Generation, Piece, Score
from .retry import Attempts, Waiting

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

A = TypeVar("A")
P = ParamSpec("P")


def _answered(build: Callable[Concatenate[Calls, P], Call[A]]) -> Callable[Concatenate[Client, P], A]:
    """The method that makes a call and waits for its answer."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> A:
        return self._answer(build(self._calls, *args, **kwargs), _Stop())

    return described(method, build)


def _streamed(build: Callable[Concatenate[Calls, P], Call[A]]) -> Callable[Concatenate[Client, P], Stream[A]]:
    """The method that makes a call and answers messages as they come. Closing the iterator ends the call."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Stream[A]:
        return self._messages(build(self._calls, *args, **kwargs))

    return described(method, build)


class Client(Base):
    """A client of one or several equal servers, for any number of threads.

    It sends the deadline with every call, tries again what is worth it (`RetryPolicy`) and answers frozen dataclasses
    or raises a `PlumbError`. It never makes up a value.
    """

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
    def score(
        self, items: Iterable[Item], *, on_error: Literal["raise"] = "raise", **options: Unpack[ScoreOptions]
    ) -> list[Score]: ...
    @overload
    def score(
        self, items: Iterable[Item], *, on_error: Literal["return"], **options: Unpack[ScoreOptions]
    ) -> list[Score | PlumbError]: ...
    def score(self, items: Iterable[Item], *, on_error: OnError = "raise", **options: Unpack[ScoreOptions]) -> Any:
        """Scores any number of items, in calls of at most `batch_size`, and answers in their order.

        An item that fails does not fail its neighbours: with `on_error="return"` its error is in its place, otherwise
        the first one is raised. What would fail the next call too, such as an unknown model, is always raised.
        `ScoreOptions` has all options.
        """
        with self.score_stream(items, on_error=on_error, **options) as stream:
            return list(stream)

    @overload
    def score_stream(
        self, items: Iterable[Item], *, on_error: Literal["raise"] = "raise", **options: Unpack[ScoreOptions]
    ) -> Stream[Score]: ...
    @overload
    def score_stream(
        self, items: Iterable[Item], *, on_error: Literal["return"], **options: Unpack[ScoreOptions]
    ) -> Stream[Score | PlumbError]: ...
    def score_stream(
        self, items: Iterable[Item], *, on_error: OnError = "raise", **options: Unpack[ScoreOptions]
    ) -> Stream[Any]:
        """Scores items as they come, also without end, and answers in their order.

        At most `batch_size` times `concurrency` items are taken beyond the answers that were read. A call waits until
        it has its `batch_size` items: where the next item follows from an answer, or comes late, let `batch_size` and
        `concurrency` be 1. `timeout` is that of each call. Closing the iterator ends the calls in flight.
        """
        scoring, stop = self._calls.scoring(items, on_error, **options), _Stop()
        return Stream(self._scores(scoring, items, stop), stop)

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Generation:
        """Samples text that follows a prompt and answers it whole. `GenerateOptions` has all options."""
        with self.generate_stream(prompt, **options) as stream:
            return stream.result()

    def generate_stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> GenerationStream:
        """Samples text that follows a prompt and answers it as it comes."""
        return GenerationStream(self._messages(self._calls.generate(prompt, **options)))

    def wait_ready(self, timeout: float | None = 60.0) -> None:
        """Waits until a server is serving; raises why none is when the time is over."""
        waiting = Waiting(timeout)
        while True:
            try:
                pause = waiting.pause(self.health(timeout=waiting.remaining()))
            except (UnavailableError, DeadlineExceededError) as error:
                pause = waiting.pause(error)
            if pause is None:
                return
            time.sleep(pause)

    def close(self) -> None:
        """Closes the connections. Calls after that make new ones."""
        with self._lock:
            channels, self._channels = self._channels or [], None
        for channel in channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _channel(self, turn: int) -> grpc.Channel:
        channels: list[grpc.Channel] = self._pool(grpc.insecure_channel, grpc.secure_channel)
        return channels[turn % len(channels)]

    def _answer(self, call: Call[A], stop: _Stop) -> A:
        """Makes a call that has one answer: deadline, tries, pauses."""
        attempts, turn = Attempts(self._options.retry, call.timeout), next(self._turns)
        while True:
            stub = self._channel(turn + attempts.made).unary_unary(**call.stub())
            rpc = stub.future(call.request, timeout=attempts.remaining(), metadata=self._metadata)
            attempts.made += 1
            try:
                return call.convert(stop.result(rpc))
            except grpc.RpcError as error:
                pause = attempts.pause(of_rpc(error, attempts.made), call.may_repeat)
            stop.sleep(pause)

    def _messages(self, call: Call[A]) -> Stream[A]:
        """Makes a call that has many answers. It is tried again until the first one comes, not after it."""
        stop = _Stop()
        return Stream(self._read(call, stop), stop)

    def _read(self, call: Call[A], stop: _Stop) -> Generator[A, None, None]:
        attempts, turn = Attempts(self._options.retry, call.timeout), next(self._turns)
        while True:
            stub = self._channel(turn + attempts.made).unary_stream(**call.stub())
            rpc = stub(call.request, timeout=attempts.remaining(), metadata=self._metadata)
            attempts.made += 1
            opened = False
            try:
                with stop.waiting(rpc):
                    for message in rpc:
                        opened = True
                        yield call.convert(message)
                return
            except grpc.RpcError as error:
                pause = attempts.pause(of_rpc(error, attempts.made), call.may_repeat and not opened)
            finally:
                rpc.cancel()
            stop.sleep(pause)

    def _scores(self, scoring: Scoring, items: Iterable[Item], stop: _Stop) -> Generator[Any, None, None]:
        with closing(self._window(scoring, items, stop)) as window:
            for results in window:
                for result in results:
                    yield scoring.said(result)

    def _window(
        self, scoring: Scoring, items: Iterable[Item], stop: _Stop
    ) -> Generator[list[Score | PlumbError], None, None]:
        """The batches' results in order, with a bounded number of calls in flight."""
        cutter = Cutter(scoring)
        if scoring.concurrency == 1:
            for batch in cutter.cut(items):
                yield self._batch(scoring, batch, stop)
            return
        threads = ThreadPoolExecutor(scoring.concurrency, thread_name_prefix="plumb")
        window: deque[Future[list[Score | PlumbError]]] = deque()
        try:
            for batch in cutter.cut(items):
                window.append(threads.submit(self._batch, scoring, batch, stop))
                while window and (len(window) >= scoring.concurrency or window[0].done()):
                    yield window.popleft().result()
            while window:
                yield window.popleft().result()
        finally:
            stop.all()
            threads.shutdown(cancel_futures=True)

    def _batch(self, scoring: Scoring, batch: Batch, stop: _Stop) -> list[Score | PlumbError]:
        began = time.monotonic()
        try:
            found = self._answer(scoring.call(batch), stop)
        except PlumbError as error:
            parts = scoring.parts(error, batch, time.monotonic() - began)
            return [r for part in parts for r in self._batch(scoring, part, stop)] or scoring.failed(error, batch)
        with suppress(PlumbError):
            for part in batch.away(found):
                [found[part.first - batch.first]] = self._answer(scoring.call(part), stop)
        return found


class Stream(Iterator[A]):
    """Answers as they come. Closing it ends the calls, also for a thread that waits for the next answer."""

    def __init__(self, answers: Generator[A, None, None], stop: _Stop) -> None:
        self._answers, self._stop = answers, stop

    def __next__(self) -> A:
        return next(self._answers)

    def close(self) -> None:
        """Ends the calls. Who waits for an answer gets a `CallCancelledError`."""
        self._stop.all()
        # That of another thread cannot be closed while it runs, and ends by itself.
        with suppress(ValueError):
            self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class GenerationStream(Iterator[Piece]):
    """Generated text as it comes. Closing it ends the call, also for a thread that waits for the next piece."""

    def __init__(self, messages: Stream[Any]) -> None:
        self._messages, self._collector = messages, Collector()

    def __next__(self) -> Piece:
        for message in self._messages:
            piece = self._collector.add(message)
            if piece is not None:
                return piece
        raise StopIteration

    def result(self) -> Generation:
        """All of the text, read to its end."""
        for _ in self:
            pass
        return self._collector.result()

    def close(self) -> None:
        """Ends the call."""
        self._messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Stop:
    """Ends calls that other threads wait for."""

    def __init__(self) -> None:
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._waiting: set[Any] = set()

    def all(self) -> None:
        """Ends all calls, and those that would begin."""
        with self._lock:
            self._stopped.set()
            waiting = list(self._waiting)
        for rpc in waiting:
            rpc.cancel()

    @contextmanager
    def waiting(self, rpc: Any) -> Generator[None, None, None]:
        """While a call is waited for."""
        with self._lock:
            self._waiting.add(rpc)
            stopped = self._stopped.is_set()
        try:
            if stopped:
                rpc.cancel()
            yield
        finally:
            with self._lock:
                self._waiting.discard(rpc)

    def result(self, rpc: Any) -> Any:
        """The answer of a call."""
        try:
            with self.waiting(rpc):
                return rpc.result()
        except grpc.FutureCancelledError:
            raise CallCancelledError("the call was given up") from None
        except BaseException:
            # Whoever interrupts the program does not want the answer any more.
            rpc.cancel()
            raise

    def sleep(self, seconds: float) -> None:
        """A pause that the end cuts short."""
        if self._stopped.wait(seconds):
            raise CallCancelledError("the call was given up")
