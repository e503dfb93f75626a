"""Transcripts with `Human:` and `Assistant:` markers, read into turns."""

from __future__ import annotations

import re

_MARKER = re.compile(r"(?:\A|\n\n+)(Human:|HUMAN:|Assistant:|ASSISTANT:)")


def turns(transcript: str) -> list[dict[str, str]]:
    """Turns of a transcript, oldest first, without the white space around each.

    A marker counts at the start of the text or after a blank line, as in hh-rlhf; the same word inside a paragraph is
    text. What stands before the first marker is the user's.
    """
    parts = _MARKER.split(transcript)
    roles = ["user", *("user" if marker.lower() == "human:" else "assistant" for marker in parts[1::2])]
    said = [{"role": role, "content": content.strip()} for role, content in zip(roles, parts[0::2], strict=True)]
    # Nothing stands before a leading marker; an empty turn elsewhere is the data's.
    return said if said[0]["content"] else said[1:]
