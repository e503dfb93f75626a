"""When a call is tried again."""

import pytest

from plumb_client import (
    PATIENT,
    DeadlineExceededError,
    Health,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PlumbError,
    ResourceExhaustedError,
    RetryPolicy,
    UnavailableError,
)
from plumb_client.retry import Attempts, Waiting

AWAY, BUSY = UnavailableError, ResourceExhaustedError


@pytest.mark.parametrize(
    ("attempt", "kind", "retry_after", "remaining", "delay"),
    [
        # The pause doubles until the tries are used up.
        (1, AWAY, None, None, 0.1),
        (2, AWAY, None, None, 0.2),
        (4, AWAY, None, None, 0.8),
        (5, AWAY, None, None, None),
        # The server's own delay comes first, whatever the code.
        (1, AWAY, 1.0, None, 1.1),
        (1, BUSY, 1.0, None, 1.1),
        (1, BUSY, None, None, None),
        # Not past the deadline.
        (1, AWAY, None, 0.1, None),
        (1, AWAY, None, 0.101, 0.1),
        (1, BUSY, 1.0, 0.9, None),
        # A busy server is asked until the deadline, and for ever where there is none.
        (5, BUSY, 1.0, 2.7, 2.6),
        (5, BUSY, 1.0, None, 2.6),
        (5, AWAY, 1.0, 2.7, None),
        # Nothing else is worth it.
        (1, InvalidArgumentError, 0.01, None, None),
        (1, NotFoundError, 0.01, None, None),
        (1, InternalError, 0.01, None, None),
        (1, DeadlineExceededError, 0.01, None, None),
        (1, PlumbError, 0.01, None, None),
    ],
)
def test_delays(attempt, kind, retry_after, remaining, delay):
    found = RetryPolicy().delay(attempt, kind("why", retry_after=retry_after), remaining, jitter=1.0)
    assert found == (None if delay is None else pytest.approx(delay))


def test_the_pause_is_capped_and_jittered():
    policy = RetryPolicy(max_attempts=2000)
    assert policy.delay(1000, AWAY("why"), None, 1.0) == policy.max_backoff
    assert policy.delay(1000, AWAY("why"), None, 0.0) == 0.0
    assert policy.delay(1, AWAY("why"), None, 0.5) == pytest.approx(0.05)
    never = RetryPolicy(max_attempts=1)
    assert never.delay(1, AWAY("why"), None, 1.0) is None
    assert never.delay(1, BUSY("why", retry_after=0.001), 1.0, 1.0) is None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tries_share_one_deadline_and_a_busy_server_uses_none_up():
    clock = Clock()
    attempts = Attempts(RetryPolicy(max_attempts=2), 10.0, clock, lambda: 0.0)
    for remaining in (10.0, 7.0, 4.0):
        assert attempts.remaining() == remaining
        clock.now += 1.0
        assert attempts.pause(BUSY("busy", retry_after=2.0), may_repeat=True) == 2.0
        clock.now += 2.0
    assert attempts.pause(AWAY("away"), may_repeat=True) == 0.0
    with pytest.raises(AWAY):
        attempts.pause(AWAY("away"), may_repeat=True)
    clock.now = 11.0
    assert attempts.remaining() == 0.0


def test_without_a_deadline_a_busy_server_is_waited_for_as_well():
    attempts = Attempts(RetryPolicy(max_attempts=2), None, jitter=lambda: 0.0)
    assert [attempts.pause(BUSY("busy", retry_after=2.0), may_repeat=True) for _ in range(50)] == [2.0] * 50


def test_a_patient_policy_waits_for_ten_minutes_and_says_so(caplog):
    attempts = Attempts(PATIENT, None, jitter=lambda: 0.5)
    waited = sum(attempts.pause(AWAY("away"), may_repeat=True) for _ in range(PATIENT.max_attempts - 1))
    assert 570.0 < waited < 630.0
    assert len(caplog.records) == 1
    with pytest.raises(AWAY):
        attempts.pause(AWAY("away"), may_repeat=True)


def test_what_must_not_be_repeated_is_not():
    with pytest.raises(AWAY):
        Attempts(RetryPolicy(), None).pause(AWAY("away"), may_repeat=False)


def test_waiting_says_at_the_end_what_it_saw():
    clock = Clock()
    waiting = Waiting(1.0, clock)
    assert waiting.pause(Health.NOT_SERVING) is not None
    assert waiting.pause(Health.SERVING) is None
    clock.now = 0.95
    with pytest.raises(UnavailableError, match="not_serving"):
        waiting.pause(Health.NOT_SERVING)
    with pytest.raises(UnavailableError, match="refused"):
        waiting.pause(UnavailableError("refused"))
