"""Docstrings are plain text: brackets in them are no Markdown links, and documents that they cite become links."""

from __future__ import annotations

import re
from typing import Any

import griffe

_CITED = re.compile(r"(?<![\w/(])docs/((?:[\w-]+/)*[\w-]+\.md(?:#[\w-]+)?)")


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring before mkdocstrings renders it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            parts = re.split(r"(`[^`]*`)", obj.docstring.value)
            parts[::2] = [
                _CITED.sub(r"[\1](../\1)", re.sub(r"\](?=[\[(])", r"\\]", part)).replace("$", "\\$")
                for part in parts[::2]
            ]
            obj.docstring.value = "".join(parts)
