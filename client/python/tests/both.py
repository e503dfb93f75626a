"""One way to ask both clients, so that a test is written once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

import plumb_client
import plumb_client.aio

KINDS = ("sync", "asyncio")


def ask(kind: str, target: Any, use: Callable[[Any], Any], **options: Any) -> Any:
    """What `use` answers for a client of a kind: a value, or a list of what it iterates over."""
    if kind == "sync":
        with plumb_client.Client(target, **options) as client:
            answer = use(client)
            return list(answer) if hasattr(answer, "__next__") else answer

    async def main() -> Any:
        async with plumb_client.aio.Client(target, **options) as client:
            answer = use(client)
            if hasattr(answer, "__anext__"):
                return [value async for value in answer]
            return await answer if inspect.isawaitable(answer) else answer

    return asyncio.run(main())
