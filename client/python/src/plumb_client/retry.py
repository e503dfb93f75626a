"""When a failed call is tried again: policy only, no network."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from .errors import PlumbError, UnavailableError
from .results import Health


@dataclass(frozen=True)
class RetryPolicy:
    """Exponential back-off with jitter.

    Tried again are UNAVAILABLE, and RESOURCE_EXHAUSTED only where the server says when to come back: without that the
    request itself is too large and would fail for ever. The server's delay is always waited for in full. A server that
    is busy and says for how long is asked again until the deadline, however often that is, and without a deadline for
    ever: such tries are not counted.
    """

    max_attempts: int = 5
    """Most tries that are counted, the first included; 1 never tries again."""
    initial_backoff: float = 0.1
    """Longest pause after the first try, in seconds."""
    max_backoff: float = 5.0
    """Longest pause at all, a server's own wish aside."""
    multiplier: float = 2.0
    """Growth of the pause from try to try."""

    def counts(self, failure: PlumbError) -> bool:
        """Whether a failure uses up a try."""
        busy = failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED and failure.retryable
        return self.max_attempts <= 1 or not busy

    def delay(self, attempt: int, failure: PlumbError, remaining: float | None, jitter: float) -> float | None:
        """Seconds to wait before trying again, or None if the failure stands.

        `attempt` is the number of tries that are counted, from 1, `jitter` lies between 0 and 1, `remaining` is the
        time to the deadline. The pause is the server's delay plus `jitter` times the back-off, so that clients that
        failed together come back apart.
        """
        used_up = attempt >= self.max_attempts and self.counts(failure)
        if not failure.retryable or used_up:
            return None
        growth = max(self.multiplier, 1.0) ** min(max(attempt - 1, 0), 64)
        delay = (failure.retry_after or 0.0) + jitter * min(self.initial_backoff * growth, self.max_backoff)
        # A try that would start after the deadline is not worth the wait.
        return delay if remaining is None or delay < remaining else None


PATIENT = RetryPolicy(max_attempts=240)
"""For jobs that outlive a server's restart: at pauses of 2.5 seconds on average, ten minutes without a server."""

_log = logging.getLogger(__name__)


class Deadline:
    """The end of a wait; None never ends."""

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._at = None if timeout is None else clock() + timeout

    def remaining(self) -> float | None:
        """Seconds that are left."""
        return None if self._at is None else max(0.0, self._at - self._clock())


class Attempts(Deadline):
    """The tries of one call: how much time is left, and what follows a failure."""

    def __init__(
        self,
        policy: RetryPolicy,
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        super().__init__(timeout, clock)
        self._policy, self._jitter = policy, jitter
        self._counted = 0
        self.made = 0
        """Tries so far."""

    def pause(self, failure: PlumbError, may_repeat: bool) -> float:
        """Seconds to wait before the next try; raises the failure if there is to be none."""
        if not may_repeat:
            raise failure
        remaining = self.remaining()
        self._counted += self._policy.counts(failure)
        delay = self._policy.delay(self._counted, failure, remaining, self._jitter())
        if delay is None:
            raise failure
        if self._counted == RetryPolicy.max_attempts:
            # Minutes of waiting should not look like work.
            _log.warning("still trying after %d tries: %s", self.made, failure)
        return delay


class Waiting(Deadline):
    """Looks at a server until it serves."""

    _PAUSE = 0.1

    def pause(self, seen: Health | PlumbError) -> float | None:
        """Seconds to the next look, or None if it serves; raises what was seen when the time is over."""
        if seen is Health.SERVING:
            return None
        remaining = self.remaining()
        if remaining is not None and remaining <= self._PAUSE:
            raise seen if isinstance(seen, PlumbError) else UnavailableError(f"the server is {seen.value}")
        return self._PAUSE
