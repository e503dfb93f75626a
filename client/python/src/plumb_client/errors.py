"""What can go wrong, for a whole call and for a single item."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from ._proto import common_pb2, wire_pb2

_Metadata: TypeAlias = "list[tuple[str, str | bytes]]"


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that the server refused."""

    field: str
    """Path of the field, such as `items[3].conversation`."""
    description: str
    """What is wrong with it."""


class PlumbError(Exception):
    """A call, or an item of one, that has no answer. Every gRPC code has a subclass."""

    code = grpc.StatusCode.UNKNOWN
    """The gRPC code."""

    def __init__(
        self,
        message: str,
        *,
        details: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
        attempts: int = 1,
        index: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """What is wrong and what to do, in the server's words."""
        self.details = details
        """With INVALID_ARGUMENT: which fields, and why."""
        self.retry_after = retry_after
        """Seconds after which the server would like to be asked again."""
        self.attempts = attempts
        """Tries that were made."""
        self.index = index
        """With scores: which of the items has failed, from 0."""

    @property
    def retryable(self) -> bool:
        """Whether the same call may succeed later. A request that is too large for any time has no `retry_after`."""
        busy = self.code == grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_after is not None
        return busy or self.code == grpc.StatusCode.UNAVAILABLE

    def of_item(self, index: int) -> PlumbError:
        """The error of a call, as that of one of its items."""
        error = copy.copy(self)
        error.message, error.index = _PLACE.sub("", self.message), index
        error.args = (error.message,)
        return error

    def __str__(self) -> str:
        item = "" if self.index is None else f"item {self.index}: "
        tries = "" if self.attempts == 1 else f" (after {self.attempts} tries)"
        return f"{item}{self.code.name}: {self.message}{tries}"


class InvalidArgumentError(PlumbError):
    """The request makes no sense, whatever state the server is in."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(PlumbError):
    """No such model, version or label."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExistsError(PlumbError):
    """A version of this number is loaded or loading."""

    code = grpc.StatusCode.ALREADY_EXISTS


class ResourceExhaustedError(PlumbError):
    """The server has too much to do, or the message is too large."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(PlumbError):
    """No server could be reached, or it is starting or going away."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(PlumbError):
    """The deadline passed before there was an answer."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CallCancelledError(PlumbError):
    """The call was given up."""

    code = grpc.StatusCode.CANCELLED


class FailedPreconditionError(PlumbError):
    """The request is sound, and the model or the server is not in the state that it needs."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnauthenticatedError(PlumbError):
    """No key, or one that nobody has."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(PlumbError):
    """The key is good, and not for this call."""

    code = grpc.StatusCode.PERMISSION_DENIED


class OutOfRangeError(PlumbError):
    """A value lies outside of what is there."""

    code = grpc.StatusCode.OUT_OF_RANGE


class UnimplementedError(PlumbError):
    """The server does not know the call."""

    code = grpc.StatusCode.UNIMPLEMENTED


class AbortedError(PlumbError):
    """The call was broken off by the server."""

    code = grpc.StatusCode.ABORTED


class DataLossError(PlumbError):
    """Data is lost."""

    code = grpc.StatusCode.DATA_LOSS


class InternalError(PlumbError):
    """A fault of the server, a score that is not a finite number, or an answer that does not fit the request."""

    code = grpc.StatusCode.INTERNAL


_KINDS: dict[grpc.StatusCode, type[PlumbError]] = {kind.code: kind for kind in PlumbError.__subclasses__()}
_PLACE = re.compile(r"^(items|candidates)\[\d+\](: |\.)")
"""An item's place in its call, which is not that among all items."""

_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def of_item(error: common_pb2.ItemError, index: int) -> PlumbError:
    """The error of an item."""
    kind = _KINDS.get(_CODES.get(error.code, grpc.StatusCode.UNKNOWN), PlumbError)
    return kind(_PLACE.sub("", error.message), index=index)


def of_rpc(error: Any, attempts: int) -> PlumbError:
    """The error of a call: a `grpc.Call` or `grpc.aio.AioRpcError` that failed."""
    metadata = [(key, value) for key, value in error.trailing_metadata() or ()]
    details, retry_after = _status_details(metadata)
    kind = _KINDS.get(error.code(), PlumbError)
    return kind(error.details() or "", details=details, retry_after=retry_after, attempts=attempts)


def _status_details(metadata: _Metadata) -> tuple[tuple[FieldViolation, ...], float | None]:
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for key, value in metadata:
        if key == "grpc-retry-pushback-ms" and retry_after is None:
            retry_after = _pushback(value)
        if key != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            for detail in wire_pb2.Status.FromString(value).details:
                if detail.type_url.endswith("/google.rpc.RetryInfo"):
                    delay = wire_pb2.RetryInfo.FromString(detail.value).retry_delay
                    retry_after = max(0.0, delay.seconds + delay.nanos / 1e9)
                elif detail.type_url.endswith("/google.rpc.BadRequest"):
                    bad = wire_pb2.BadRequest.FromString(detail.value)
                    violations += [FieldViolation(v.field, v.description) for v in bad.field_violations]
        except DecodeError:
            # Details that nobody can read are none; the code and the message stand.
            continue
    return tuple(violations), retry_after


def _pushback(value: str | bytes) -> float | None:
    """Seconds. Negative and unreadable values say that the call should not be repeated (gRFC A6)."""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    return int(text) / 1000 if text.isdigit() else None
