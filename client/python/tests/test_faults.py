"""Servers that refuse, hang, die or are slow."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import socket
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from both import KINDS, ask
from fake import fake, refuse, retry_info, scores, violation

import plumb_client.aio
from plumb_client import (
    CallCancelledError,
    Client,
    DeadlineExceededError,
    Health,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    RetryPolicy,
    Score,
    Tls,
    UnauthenticatedError,
    UnavailableError,
)
from plumb_client._proto import generation_pb2, preference_pb2, wire_pb2

PATIENCE = 60.0
SOON = RetryPolicy(initial_backoff=0.001)

both = pytest.mark.parametrize("kind", KINDS)


def rewards(results):
    return [result.reward for result in results]


@both
@pytest.mark.parametrize(
    ("code", "details", "pushback", "tries"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [retry_info(1)], None, 3),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], "1", 3),
        (grpc.StatusCode.UNAVAILABLE, [], None, 3),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], None, 1),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], "-1", 1),
        (grpc.StatusCode.INTERNAL, [retry_info(1)], None, 1),
        (grpc.StatusCode.NOT_FOUND, [], None, 1),
    ],
)
def test_what_may_succeed_later_is_tried_again(kind, code, details, pushback, tries):
    seen = []

    def behave(request, context):
        seen.append(request)
        if len(seen) < 3:
            refuse(context, code, *details, pushback=pushback)
        return scores(request)

    with fake(behave) as target:
        if tries == 3:
            assert rewards(ask(kind, target, lambda c: c.score(["1"]), retries=SOON)) == [1.0]
        else:
            with pytest.raises(plumb_client.PlumbError) as raised:
                ask(kind, target, lambda c: c.score(["1"]), retries=SOON)
            assert (raised.value.code, raised.value.attempts) == (code, 1)
    assert len(seen) == tries
    assert all(request == seen[0] for request in seen)


@both
def test_a_busy_server_is_asked_until_the_deadline_and_others_until_the_tries_are_used_up(kind):
    calls = itertools.count(1)

    def behave(request, context):
        if next(calls) < 20:
            refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, retry_info(1))
        refuse(context, grpc.StatusCode.UNAVAILABLE)

    with fake(behave) as target, pytest.raises(UnavailableError, match="tries") as raised:
        ask(kind, target, lambda c: c.score(["1"]), retries=RetryPolicy(max_attempts=2, initial_backoff=0.001))
    assert raised.value.attempts == 21


@both
def test_a_server_that_hangs_ends_at_the_deadline(kind):
    over = threading.Event()

    def behave(request, context):
        assert over.wait(PATIENCE)
        return scores(request)

    with fake(behave) as target:
        try:
            with pytest.raises(DeadlineExceededError):
                ask(kind, target, lambda c: c.score(["1"], timeout=0.05))
        finally:
            over.set()


@both
def test_the_server_knows_until_when_an_answer_is_of_use(kind):
    told = []

    def behave(request, context):
        told.append(context.time_remaining())
        return scores(request)

    with fake(behave) as target:
        ask(kind, target, lambda c: c.score(["1"]), timeout=1000.0)
        ask(kind, target, lambda c: c.score(["1"], timeout=None), timeout=1000.0)
    assert 900.0 < told[0] < 1001.0
    # Older libraries answer the longest time there is instead of None.
    assert told[1] is None or told[1] > 1e6


@both
def test_a_refusal_beyond_the_deadline_is_not_waited_for(kind):
    def behave(request, context):
        refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, wire_pb2.RetryInfo(retry_delay={"seconds": 3600}))

    with fake(behave) as target, pytest.raises(ResourceExhaustedError) as raised:
        ask(kind, target, lambda c: c.score(["1"]))
    assert (raised.value.retry_after, raised.value.retryable, raised.value.attempts) == (3600.0, True, 1)


def dead_target():
    """An address that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@both
def test_calls_go_to_servers_in_turn_and_past_a_dead_one(kind):
    served = [0, 0]

    def count(index):
        def behave(request, context):
            served[index] += 1
            return scores(request)

        return behave

    with fake(count(0)) as first, fake(count(1)) as second:
        items = [str(i) for i in range(12)]
        targets = [first, dead_target(), second]
        found = ask(kind, targets, lambda c: c.score(items, batch_size=1), retries=SOON)
    assert rewards(found) == [float(i) for i in range(12)]
    # The dead one's turns are the second's.
    assert served == [4, 8]


def test_clients_do_not_all_begin_with_the_same_server():
    first = Client(["a:1", "b:2", "c:3"])
    assert {next(client._turns) % 3 for client in (pickle.loads(pickle.dumps(first)) for _ in range(100))} == {0, 1, 2}


@both
def test_no_server_at_all(kind):
    with pytest.raises(UnavailableError) as raised:
        ask(kind, dead_target(), lambda c: c.score(["1"]), retries=RetryPolicy(max_attempts=2, initial_backoff=0.001))
    assert raised.value.attempts == 2
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        ask(kind, dead_target(), lambda c: c.wait_ready(0.0))


@both
def test_waiting_until_a_server_serves(kind):
    states = iter([2, 0, 1])

    def behave(request, context):
        return wire_pb2.HealthCheckResponse(status=next(states))

    with fake(behave) as target:
        ask(kind, target, lambda c: c.wait_ready(PATIENCE))
    assert list(states) == []
    with fake(lambda request, context: wire_pb2.HealthCheckResponse(status=2)) as target:
        assert ask(kind, target, lambda c: c.health()) is Health.NOT_SERVING


@both
def test_headers_of_every_call(kind):
    seen = []

    def behave(request, context):
        seen.append((dict(context.invocation_metadata()), request))
        return scores(request)

    with fake(behave) as target:
        options = {"request_id": "r", "priority": "high", "model": "m", "label": "canary", "truncation": "left"}
        use = lambda c: c.score(["1"], max_tokens=9, objective="sum", per_token=True, **options)  # noqa: E731
        ask(kind, target, use, api_key="key", client_id="me", model="default")
    headers, request = seen[0]
    assert (headers["authorization"], headers["x-client-id"]) == ("Bearer key", "me")
    assert request == preference_pb2.ScoreRequest(
        model={"name": "m", "label": "canary"},
        items=[{"text": "1"}],
        text={"truncation": "TRUNCATION_LEFT", "max_tokens": 9},
        objective="OBJECTIVE_SUM_LOG_PROB",
        per_token=True,
        request_id="r",
        priority="PRIORITY_HIGH",
    )


class Gate:
    """Holds calls back until it is opened, and counts them."""

    def __init__(self, together: int) -> None:
        self._together, self._lock = together, threading.Condition()
        self.inside = self.most = self.begun = 0

    def __call__(self, request, context):
        with self._lock:
            self.begun += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._lock.notify_all()
            assert self._lock.wait_for(lambda: self.begun >= self._together, PATIENCE)
            self.inside -= 1
        return scores(request)


@both
def test_a_bounded_number_of_calls_is_in_flight_and_the_source_is_read_no_further(kind):
    # Nobody is answered before three calls are there, so three are sent at once.
    gate, taken = Gate(3), []

    def source():
        for i in itertools.count():
            taken.append(i)
            yield str(i)

    def first(client):
        found = client.score_stream(source(), batch_size=2, concurrency=3)
        if kind == "sync":
            return [next(found) for _ in range(4)], found.close(), len(taken)

        async def some():
            values = [await found.__anext__() for _ in range(4)]
            await found.aclose()
            return values, None, len(taken)

        return some()

    with fake(gate) as target:
        found, _, read = ask(kind, target, first)
    assert rewards(found) == [0.0, 1.0, 2.0, 3.0]
    assert gate.most == 3
    assert read <= 4 + 2 * 3


@both
def test_answers_come_in_the_order_of_the_items(kind):
    # Every call waits for the one after it.
    done = [threading.Event() for _ in range(4)]

    def behave(request, context):
        index = int(request.items[0].text)
        if index < 3:
            assert done[index + 1].wait(PATIENCE)
        done[index].set()
        return scores(request)

    with fake(behave) as target:
        found = ask(kind, target, lambda c: c.score(list("0123"), batch_size=1, concurrency=4))
    assert rewards(found) == [0.0, 1.0, 2.0, 3.0]


def test_an_asynchronous_source():
    async def source():
        for i in range(5):
            yield str(i)

    with fake(scores) as target:
        assert rewards(ask("asyncio", target, lambda c: c.score(source(), batch_size=2))) == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_client_goes_on_in_another_event_loop():
    with fake(scores) as target:
        client = plumb_client.aio.Client(target)
        for text in ("1", "2"):
            assert rewards(asyncio.run(client.score([text]))) == [float(text)]


@both
def test_a_failed_call_ends_those_beside_it(kind):
    cancelled, waiting = threading.Event(), threading.Event()

    def behave(request, context):
        if request.items[0].text == "0":
            assert waiting.wait(PATIENCE)
            refuse(context, grpc.StatusCode.UNAUTHENTICATED)
        context.add_callback(cancelled.set)
        waiting.set()
        assert cancelled.wait(PATIENCE)
        return scores(request)

    with fake(behave) as target:
        with pytest.raises(UnauthenticatedError):
            ask(kind, target, lambda c: c.score(["0", "1"], batch_size=1, on_error="return", timeout=None))
        assert cancelled.wait(PATIENCE)


@both
def test_an_item_that_fails_does_not_fail_its_neighbours(kind):
    items = ["0", "x", "2", "y"]
    with fake(scores) as target:
        found = ask(kind, target, lambda c: c.score(items, batch_size=3, on_error="return"))
        assert [type(result) for result in found] == [Score, InvalidArgumentError, Score, InvalidArgumentError]
        # Where it stood in its call is of no interest.
        assert [(found[i].index, found[i].message) for i in (1, 3)] == [(1, "x"), (3, "y")]
        with pytest.raises(InvalidArgumentError, match=r"^item 1: INVALID_ARGUMENT: x$"):
            ask(kind, target, lambda c: c.score(items, batch_size=3))


@both
@pytest.mark.parametrize(
    ("code", "details", "returned"),
    [
        # All items failed by the same code, so the call did.
        (grpc.StatusCode.INVALID_ARGUMENT, [violation("items[0]")], True),
        (grpc.StatusCode.INTERNAL, [], True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, [], True),
        # The next call would meet it too.
        (grpc.StatusCode.INVALID_ARGUMENT, [violation("text.max_tokens")], False),
        (grpc.StatusCode.NOT_FOUND, [], False),
        (grpc.StatusCode.PERMISSION_DENIED, [], False),
    ],
)
def test_a_call_that_fails_as_a_whole(kind, code, details, returned):
    def behave(request, context):
        if request.items[0].text in ("2", "3"):
            refuse(context, code, *details)
        return scores(request)

    with fake(behave) as target:
        use = lambda c: c.score(list("01234"), batch_size=2, on_error="return")  # noqa: E731
        if returned:
            found = ask(kind, target, use)
            assert [getattr(result, "reward", None) for result in found] == [0.0, 1.0, None, None, 4.0]
            assert [(result.code, result.index) for result in found[2:4]] == [(code, 2), (code, 3)]
        else:
            with pytest.raises(plumb_client.PlumbError) as raised:
                ask(kind, target, use)
            assert raised.value.code == code


@both
def test_a_server_that_takes_fewer_items_gets_smaller_calls(kind):
    sizes = []

    def behave(request, context):
        sizes.append(len(request.items))
        if len(request.items) > 3:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, violation("items"))
        return scores(request)

    with fake(behave) as target:
        assert rewards(ask(kind, target, lambda c: c.score(list("0123456789")))) == [float(i) for i in range(10)]
    assert max(sizes[1:]) <= 5


@both
def test_what_a_server_takes_is_found_once(kind):
    refused = []

    def behave(request, context):
        if len(request.items) > 8:
            refused.append(len(request.items))
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, violation("items"))
        return scores(request)

    items = [str(i) for i in range(160)]
    with fake(behave) as target:
        found = ask(kind, target, lambda c: c.score_stream(items, batch_size=32, concurrency=1))
    assert rewards(found) == [float(i) for i in range(160)]
    assert refused == [32, 16, 16]


@both
def test_a_call_that_is_too_much_work_is_split(kind):
    # Of numbers as lengths, ten are the most there is ever room for.
    def behave(request, context):
        if sum(int(item.text) for item in request.items) > 10:
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, violation("items"))
        return scores(request)

    with fake(behave) as target:
        use = lambda c: c.score(["4", "5", "6", "11", "10"], on_error="return")  # noqa: E731
        found = ask(kind, target, use)
        assert [getattr(result, "reward", None) for result in found] == [4.0, 5.0, 6.0, None, 10.0]
        assert (type(found[3]), found[3].index) == (InvalidArgumentError, 3)


@both
def test_a_call_that_cannot_be_done_in_time_is_split(kind):
    sizes = []

    def behave(request, context):
        sizes.append(len(request.items))
        if len(request.items) > 2 or request.items[0].text == "4":
            refuse(context, grpc.StatusCode.DEADLINE_EXCEEDED)
        return scores(request)

    with fake(behave) as target:
        found = ask(kind, target, lambda c: c.score(list("012345"), on_error="return", timeout=PATIENCE))
        assert [getattr(result, "reward", None) for result in found] == [0.0, 1.0, 2.0, 3.0, None, 5.0]
        assert (type(found[4]), found[4].index) == (DeadlineExceededError, 4)


@both
def test_a_deadline_that_has_passed_is_not_split(kind):
    over, calls = threading.Event(), []

    def behave(request, context):
        calls.append(request)
        assert over.wait(PATIENCE)
        return scores(request)

    with fake(behave) as target:
        try:
            found = ask(kind, target, lambda c: c.score(["1", "2"], timeout=0.05, on_error="return"))
        finally:
            over.set()
    assert [type(result) for result in found] == [DeadlineExceededError] * 2
    assert len(calls) == 1


@both
def test_items_that_all_fail_have_each_their_own_reason(kind):
    def behave(request, context):
        if len(request.items) > 1 and not any(item.text.isdigit() for item in request.items):
            refuse(context, grpc.StatusCode.INVALID_ARGUMENT, violation("items[0]"))
        return scores(request)

    with fake(behave) as target:
        found = ask(kind, target, lambda c: c.score(["x", "y", "z", "4"], batch_size=3, on_error="return"))
    assert [(result.message, result.index) for result in found[:3]] == [("x", 0), ("y", 1), ("z", 2)]


@both
def test_an_item_for_which_something_was_away_is_asked_again(kind):
    asked = []

    def behave(request, context):
        asked.append([item.text for item in request.items])
        answer = preference_pb2.ScoreResponse()
        for item in request.items:
            if item.text == "gone" and len(request.items) == 1:
                refuse(context, grpc.StatusCode.UNAVAILABLE)
            if item.text == "gone" or (item.text == "1" and len(asked) == 1):
                answer.results.add(error={"code": 14, "message": "no renderer"})
            else:
                answer.results.add(score={"reward": len(item.text)})
        return answer

    with fake(behave) as target:
        use = lambda c: c.score(["0", "1", "gone", "3"], on_error="return")  # noqa: E731
        found = ask(kind, target, use, retries=RetryPolicy(max_attempts=2, initial_backoff=0.001))
    assert [getattr(result, "reward", None) for result in found] == [1.0, 1.0, None, 1.0]
    assert (type(found[2]), found[2].message, found[2].index) == (UnavailableError, "no renderer", 2)
    assert asked == [["0", "1", "gone", "3"], ["1"], ["gone"], ["gone"]]


@both
def test_what_cannot_be_sent_does_not_fail_its_neighbours(kind):
    items = ["0", "\ud800", None, [-100], [2**32], "5"]
    with fake(scores) as target:
        for size in (1, 2, 6):
            found = ask(kind, target, lambda c, size=size: c.score(items, on_error="return", batch_size=size))
            assert [getattr(result, "reward", None) for result in found] == [0.0, None, None, None, None, 5.0]
            assert {(type(result), result.index) for result in found[1:5]} == {
                (InvalidArgumentError, index) for index in range(1, 5)
            }
            assert "surrogates" in found[1].message
        for index, kind_of_error in ((1, ValueError), (2, TypeError), (3, ValueError)):
            with pytest.raises(kind_of_error, match="item 0"):
                ask(kind, target, lambda c, index=index: c.score(items[index:]))


@both
def test_all_calls_of_some_items_have_one_id(kind):
    seen = []

    def behave(request, context):
        seen.append(request.request_id)
        return scores(request)

    with fake(behave) as target:
        for _ in range(2):
            ask(kind, target, lambda c: c.score(list("0123"), batch_size=1))
        ask(kind, target, lambda c: c.score(list("01"), batch_size=1, request_id="mine"))
    assert (len(set(seen[:4])), len(set(seen[4:8])), seen[8:]) == (1, 1, ["mine"] * 2)
    assert seen[0] != seen[4]


@both
def test_a_string_is_a_list_of_one_where_strings_are_asked_for(kind):
    seen = []

    def behave(request, context):
        seen.append((request.sampling.banned_strings, request.stopping.stop_strings))
        yield from pieces("a")

    with fake(behave) as target:
        for banned, stop in (("no", "END"), (["no"], ("END",))):
            ask(kind, target, lambda c, b=banned, s=stop: c.generate_stream("q", banned_strings=b, stop_strings=s))
    assert seen == [(["no"], ["END"])] * 2


@both
def test_an_answer_that_does_not_fit_is_no_score(kind):
    answer = preference_pb2.ScoreResponse(results=[{"score": {"reward": 1.0}}])
    with fake(lambda request, context: answer) as target:
        with pytest.raises(InternalError, match="does not fit"):
            ask(kind, target, lambda c: c.score(["1", "2"]))
        nothing = preference_pb2.ScoreResponse(results=[{}])
    with fake(lambda request, context: nothing) as target, pytest.raises(InternalError, match="neither"):
        ask(kind, target, lambda c: c.score(["1"]))
    twice = preference_pb2.RankResponse(ranked=[{"index": 0}, {"index": 0}])
    with fake(lambda request, context: twice) as target, pytest.raises(InternalError, match="does not fit"):
        ask(kind, target, lambda c: c.rank("q", ["a", "b"]))


def pieces(*texts):
    yield generation_pb2.GenerateResponse(model={"name": "lm"})
    for text in texts:
        yield generation_pb2.GenerateResponse(text=text, token_ids=[1])


@both
def test_a_stream_that_breaks_is_not_begun_again(kind):
    calls = []

    def behave(request, context):
        calls.append(request)
        yield from pieces("a", "b")
        refuse(context, grpc.StatusCode.UNAVAILABLE)

    heard = []

    def use(client):
        stream = client.generate_stream("q")
        if kind == "sync":
            return [heard.append(piece.text) for piece in stream]

        async def read():
            return [heard.append(piece.text) async for piece in stream]

        return read()

    with fake(behave) as target:
        with pytest.raises(UnavailableError):
            ask(kind, target, use, retries=SOON)
        assert heard == ["a", "b"]
        with pytest.raises(UnavailableError):
            ask(kind, target, lambda c: c.generate("q"), retries=SOON)
    assert len(calls) == 2


@both
def test_a_stream_that_does_not_open_is_tried_again(kind):
    calls = itertools.count()

    def behave(request, context):
        if next(calls) == 0:
            refuse(context, grpc.StatusCode.UNAVAILABLE)
        yield from pieces("a")

    with fake(behave) as target:
        assert [p.text for p in ask(kind, target, lambda c: c.generate_stream("q"), retries=SOON)] == ["a"]
        # It ends without saying so, which is no answer.
        with pytest.raises(InternalError, match="summary"):
            ask(kind, target, lambda c: c.generate("q"))


@both
def test_a_stream_that_is_closed_ends_on_the_server(kind):
    ended = threading.Event()

    def behave(request, context):
        context.add_callback(ended.set)
        yield from pieces("a")
        assert ended.wait(PATIENCE)

    def use(client):
        stream = client.generate_stream("q", timeout=None)
        if kind == "sync":
            with stream:
                return next(stream).text

        async def first():
            async with stream:
                return (await stream.__anext__()).text

        return first()

    with fake(behave) as target:
        assert ask(kind, target, use) == "a"
        assert ended.wait(PATIENCE)


def test_a_stream_is_closed_while_another_thread_waits_for_it():
    asked, over = threading.Event(), threading.Event()

    def wait(request, context):
        asked.set()
        assert over.wait(PATIENCE)
        return scores(request)

    def stream(request, context):
        yield from pieces("a")
        wait(request, context)

    opened = {
        "scores": (wait, lambda client: client.score_stream(["1"], timeout=None)),
        "many": (wait, lambda client: client.score_stream(itertools.repeat("1"), timeout=None)),
        "text": (stream, lambda client: client.generate_stream("q", timeout=None)),
    }
    for name, (behave, use) in opened.items():
        asked.clear()
        over.clear()
        with fake(behave) as target, Client(target) as client, ThreadPoolExecutor(1) as threads:
            answers = use(client)
            found = threads.submit(list, answers)
            try:
                assert asked.wait(PATIENCE), name
                answers.close()
                with pytest.raises(CallCancelledError):
                    found.result(PATIENCE)
            finally:
                over.set()
            answers.close()
            assert list(answers) == [], name


def test_a_client_that_was_connected_is_refused_after_a_fork():
    with fake(scores) as target, Client(target) as client:
        client.score(["1"])
        pid = os.getpid()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: pid + 1)
            with pytest.raises(RuntimeError, match="fork"):
                client.score(["1"])
        assert rewards(client.score(["1"])) == [1.0]


def test_several_connections():
    peers = set()

    def behave(request, context):
        peers.add(context.peer())
        return scores(request)

    with fake(behave) as target, Client(target, connections=3) as client:
        client.score(list("012345"), batch_size=1)
    assert len(peers) == 3


@both
def test_a_message_that_is_too_large_is_refused_here(kind):
    with fake(scores) as target, pytest.raises(ResourceExhaustedError) as raised:
        ask(kind, target, lambda c: c.score(["1" * 3000]), max_message_bytes=2000)
    assert not raised.value.retryable


@both
def test_tls_with_certificates_on_both_sides(kind, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    )
    try:
        subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl to make certificates")
    pair = (key.read_bytes(), certificate.read_bytes())
    asks = grpc.ssl_server_credentials([pair], root_certificates=pair[1], require_client_auth=True)
    with fake(scores, asks) as target:
        tls = Tls.from_files(certificate, certificate, key)
        for name in (f"https://{target}", target):
            assert rewards(ask(kind, name, lambda c: c.score(["1"]), credentials=tls)) == [1.0]
        for tls in (Tls.from_files(certificate), None):
            with pytest.raises(UnavailableError):
                ask(kind, f"https://{target}", lambda c: c.score(["1"]), credentials=tls, retries=0)
    with pytest.raises(ValueError, match="belong together"):
        Tls(certificate=pair[1]).channel_credentials()
