"""How a client connects: everything that can be chosen, with its default."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc

from ._version import __version__
from .retry import RetryPolicy

DEFAULT_TARGET = "http://127.0.0.1:50051"


@dataclass(frozen=True)
class Tls:
    """Certificates for https, as PEM. Without any, servers are checked against the usual authorities."""

    ca: bytes | None = None
    """Authorities to trust instead of the usual ones."""
    certificate: bytes | None = None
    """Shown to servers that ask for one (mutual TLS)."""
    key: bytes | None = field(default=None, repr=False)
    """Its private key."""

    @classmethod
    def from_files(
        cls, ca: str | Path | None = None, certificate: str | Path | None = None, key: str | Path | None = None
    ) -> Tls:
        """Reads PEM files."""
        return cls(*(None if path is None else Path(path).read_bytes() for path in (ca, certificate, key)))

    def channel_credentials(self) -> Any:
        """What gRPC takes."""
        if (self.certificate is None) != (self.key is None):
            raise ValueError("a certificate and its key belong together")
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


Credentials: TypeAlias = "Tls | grpc.ChannelCredentials"


@dataclass(frozen=True)
class Options:
    """What a client was made with. None of it changes."""

    targets: tuple[str, ...]
    api_key: str | None = field(repr=False)
    credentials: Credentials | None
    https: Tls
    """For targets that say https, where there are no other credentials."""
    client_id: str | None
    model: str | None
    timeout: float | None
    retry: RetryPolicy
    batch_size: int
    concurrency: int
    connections: int
    max_message_bytes: int
    connect_timeout: float
    channel_options: tuple[tuple[str, Any], ...]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers of every call."""
        headers = {"authorization": self.api_key and f"Bearer {self.api_key}", "x-client-id": self.client_id}
        return tuple((name, value) for name, value in headers.items() if value is not None)

    def channels(self) -> list[tuple[str, Any, list[tuple[str, Any]]]]:
        """Address, credentials (None: plain HTTP/2) and options of every connection, in the order of their turns."""
        return [
            (*self._address(target), self._channel_options())
            for _ in range(self.connections)
            for target in self.targets
        ]

    def _address(self, target: str) -> tuple[str, Any]:
        tls = self.credentials
        if target.startswith("http://"):
            return target.removeprefix("http://").rstrip("/"), None
        if target.startswith("https://"):
            target, tls = target.removeprefix("https://").rstrip("/"), tls or self.https
        return target, tls.channel_credentials() if isinstance(tls, Tls) else tls

    def _channel_options(self) -> list[tuple[str, Any]]:
        # A name that stands for several servers, as that of a headless service does, means all of them in turn.
        balanced = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
        connect_ms = int(self.connect_timeout * 1000)
        return [
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # Whoever repeats calls is the client itself, which knows the deadline.
            ("grpc.enable_retries", 0),
            ("grpc.service_config", balanced),
            # While calls wait, the connection is probed, so that a server that vanished is noticed.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            # The longest wait for a connection; after that the next one is tried again soon.
            ("grpc.min_reconnect_backoff_ms", connect_ms),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", connect_ms),
            # Every client, and every one of its connections, for itself.
            ("grpc.use_local_subchannel_pool", 1),
            # Servers are asked directly, as by the command.
            ("grpc.enable_http_proxy", 0),
            ("grpc.primary_user_agent", f"plumb-client/{__version__}"),
            *self.channel_options,
        ]


def resolve(
    target: str | Sequence[str] | None,
    *,
    api_key: str | None,
    credentials: Credentials | None,
    client_id: str | None,
    model: str | None,
    timeout: float | None,
    retries: int | RetryPolicy | None,
    batch_size: int,
    concurrency: int,
    connections: int,
    max_message_bytes: int,
    connect_timeout: float,
    channel_options: Sequence[tuple[str, Any]],
) -> Options:
    """Fills in from the environment what was not given, by the variables of the `plumb` command."""
    given = target if target is not None else os.environ.get("PLUMB_SERVER") or DEFAULT_TARGET
    # Semicolons and spaces pass where commas separate other things.
    split = re.split(r"\s*[,;]\s*|\s+", given.strip()) if isinstance(given, str) else given
    targets = tuple(target.strip() for target in split)
    if not targets or not all(targets):
        raise ValueError("no target given")
    for name, number in [("batch_size", batch_size), ("concurrency", concurrency), ("connections", connections)]:
        if number < 1:
            raise ValueError(f"{name} must be at least 1")
    if retries is None:
        retries = int(os.environ.get("PLUMB_MAX_RETRIES") or 4)
    if isinstance(retries, int):
        retries = RetryPolicy(max_attempts=retries + 1)
    # A target without a scheme stays plain: files in the environment are for https.
    files = [os.environ.get(name) or None for name in ("PLUMB_CA_CERT", "PLUMB_CLIENT_CERT", "PLUMB_CLIENT_KEY")]
    asked = credentials is None and any(target.startswith("https://") for target in targets)
    return Options(
        targets=targets,
        api_key=api_key if api_key is not None else os.environ.get("PLUMB_API_KEY") or None,
        credentials=credentials,
        https=Tls.from_files(*files) if asked else Tls(),
        client_id=client_id if client_id is not None else os.environ.get("PLUMB_CLIENT_ID") or None,
        model=model if model is not None else os.environ.get("PLUMB_MODEL") or None,
        timeout=timeout,
        retry=retries,
        batch_size=batch_size,
        concurrency=concurrency,
        connections=connections,
        max_message_bytes=max_message_bytes,
        connect_timeout=connect_timeout,
        channel_options=tuple(channel_options),
    )
