"""Arguments of environments as they are typed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gencontrol.config import parse_override


def parse_kwargs(texts: Sequence[str] | None) -> dict[str, Any]:
    """Return KEY=VALUE texts as a dictionary; a value is read as TOML (300, true, "x", [1, 2]), else kept as text.

    Raises:
        UsageError: a text without "=".
    """
    found = {}
    for text in texts or ():
        _, value = parse_override(text)
        found[text.partition("=")[0].strip()] = value  # keywords keep their underscores and capitals
    return found
