"""What a client is made with, and whose turn it is: the part of both clients that waits for nothing."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ._calls import Calls
from .options import Credentials, Options, Tls, resolve
from .retry import PATIENT, RetryPolicy

if TYPE_CHECKING:
    from typing_extensions import Self


class Base:
    """A client of one or several equal servers."""

    def __init__(
        self,
        target: str | Sequence[str] | None = None,
        *,
        api_key: str | None = None,
        credentials: Credentials | None = None,
        client_id: str | None = None,
        model: str | None = None,
        timeout: float | None = 60.0,
        retries: int | RetryPolicy | None = None,
        batch_size: int = 32,
        concurrency: int = 4,
        connections: int = 1,
        max_message_bytes: int = 64 << 20,
        connect_timeout: float = 5.0,
        channel_options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Connects at the first call. What is not given is taken from the environment, by the variables of `plumb`:
        PLUMB_SERVER, PLUMB_API_KEY, PLUMB_CLIENT_ID, PLUMB_MODEL, PLUMB_MAX_RETRIES, and PLUMB_CA_CERT,
        PLUMB_CLIENT_CERT and PLUMB_CLIENT_KEY for https.

        Args:
            target: `http://host:port` or `https://host:port`; several, as a list or separated by commas, semicolons or
                spaces, are used in turn, and a call that is tried again goes to the next one. A name that stands for
                several addresses, such as `dns:///plumb:50051`, means all of them in turn. Default:
                `http://127.0.0.1:50051`.
            api_key: Sent as `authorization: Bearer ...`.
            credentials: Certificates for TLS; not needed for servers that the usual authorities vouch for.
            client_id: Who calls, sent as `x-client-id`: calls of one id share what the server grants a client.
            model: The model of calls that name none; default: the server's.
            timeout: Longest wait for the answer to a call in seconds, all tries together; sent to the server, which
                drops work that it cannot do in time. None waits for ever.
            retries: How often a call that may succeed later is tried again (default 4), or a whole policy.
            batch_size: Most items in a call; a server takes 256 if not told otherwise.
            concurrency: Most calls of one `score` or `score_stream` in flight.
            connections: Connections to every target; a program that moves hundreds of megabytes may want more.
            max_message_bytes: Largest message, sent or received.
            connect_timeout: Longest wait for a connection in seconds.
            channel_options: Further options of gRPC's channels.
        """
        self._setup(
            resolve(
                target,
                api_key=api_key,
                credentials=credentials,
                client_id=client_id,
                model=model,
                timeout=timeout,
                retries=retries,
                batch_size=batch_size,
                concurrency=concurrency,
                connections=connections,
                max_message_bytes=max_message_bytes,
                connect_timeout=connect_timeout,
                channel_options=channel_options,
            )
        )

    @classmethod
    def patient(cls, target: str | Sequence[str] | None = None, **options: Any) -> Self:
        """A client for a job that nobody watches, which waits for servers that are away for ten minutes: `timeout` is
        600 and `retries` is `PATIENT` if not given, the latter unless PLUMB_MAX_RETRIES says otherwise. It is what
        trainers, Ray and lm-evaluation-harness get where they name an address and no client.
        """
        if not os.environ.get("PLUMB_MAX_RETRIES"):
            options = {"retries": PATIENT, **options}
        return cls(target, **{"timeout": 600.0, **options})

    def _setup(self, options: Options) -> None:
        self._options = options
        self._calls = Calls(options)
        self._metadata = options.metadata()
        # Clients that start together, as those of a training's processes, do not all ask the same server first.
        self._turns = itertools.count(random.getrandbits(16))
        self._lock = threading.Lock()
        self._channels: list[Any] | None = None
        self._process = 0

    # A client that goes to another process connects there anew.
    def __getstate__(self) -> Options:
        if self._options.credentials is not None and not isinstance(self._options.credentials, Tls):
            raise TypeError("credentials of gRPC cannot go to another process: make the client with `Tls` instead")
        return self._options

    def __setstate__(self, options: Options) -> None:
        self._setup(options)

    def __repr__(self) -> str:
        return f"{type(self).__module__}.{type(self).__qualname__}({', '.join(self._options.targets)})"

    def _pool(self, plain: Callable[..., Any], secure: Callable[..., Any]) -> list[Any]:
        """The connections, made when they are first asked for."""
        with self._lock:
            if self._channels is not None and self._process != os.getpid():
                # They have no threads here: calls would hang.
                raise RuntimeError("this client was connected before a fork: make another one after it")
            if self._channels is None:
                self._process = os.getpid()
                self._channels = [
                    plain(address, options=options)
                    if credentials is None
                    else secure(address, credentials, options=options)
                    for address, credentials, options in self._options.channels()
                ]
            return self._channels
