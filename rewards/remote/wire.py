"""How a reward server and its client talk: JSON for facts, safetensors for tensors, nothing that could run code.

A message with tensors is one safetensors file; its facts are a JSON object in the file's header, under the metadata
key "json".  Protocol 1:

    GET  /health       → {"status": "ok"}; no token needed
    GET  /NAME         → {"protocol": 1, "reward", "kind", "version", "identity", "max_bytes"}; "/" does as well
    POST /NAME         facts {"protocol": 1, "prompts": [...] or null, "sampling_rate": Hz or null, "metadata": {...}},
                       tensor "samples" [b *d]  (uint8 stands for [0, 1] in steps of 1/255)
                       → facts {"protocol": 1, "reward", "identity", "reasons": {...}}, tensors "values" [b] float32,
                       "valid" [b] bool
    any error          → 4xx or 5xx with {"error": "one line"}

A token, where one is set, travels as `Authorization: Bearer TOKEN`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from gencontrol.errors import UsageError

PROTOCOL = 1
TENSORS = "application/x-safetensors"
TOKEN_VARIABLE = "GENCONTROL_REWARD_TOKEN"
_MAX_HEADER = 16 * 2**20  # bytes of facts; prompts are short


class WireError(ValueError):
    """A message that does not follow the protocol."""


def pack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Return a message.

    Raises:
        WireError: facts that JSON cannot hold.
    """
    from safetensors.torch import save

    try:
        text = json.dumps(facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WireError(f"prompts and metadata must be plain JSON values: {error}") from error
    return save({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, {"json": text})


def unpack(message: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and facts of a message.

    Raises:
        WireError: not a safetensors file with a JSON object of this protocol.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        (size,) = struct.unpack_from("<Q", message)
        if size > min(_MAX_HEADER, len(message)):
            raise WireError(f"the header says {size} bytes, of {len(message)} in all")
        facts = json.loads(json.loads(message[8 : 8 + size])["__metadata__"]["json"])
        tensors = load(message)
    except WireError:
        raise
    except (struct.error, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"not a safetensors message with facts ({type(error).__name__})") from error
    if not isinstance(facts, dict) or facts.get("protocol") != PROTOCOL:
        raise WireError(f"not a message of protocol {PROTOCOL}")
    return tensors, facts


def token_from_environment() -> str | None:
    """The token that client and server share; None when none is set.

    Raises:
        UsageError: a token that a header cannot carry.
    """
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise UsageError(f"{TOKEN_VARIABLE} holds spaces or characters outside ASCII; choose another token.")
    return token


def check_url(url: str) -> tuple[str, int]:
    """Host and port of a reward server's address.

    Raises:
        UsageError: not http(s)://host[:port][/name], or a password in it.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"'{url}' is no address of a reward server ({error}); give http://host:port/name.") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"'{url}' is no address of a reward server; give http://host:port/name.")
    if parts.username is not None or parts.password is not None:
        raise UsageError(f"a token does not belong into the address; set the environment variable {TOKEN_VARIABLE}.")
    return parts.hostname, port or (443 if parts.scheme == "https" else 80)


def one_line(text: str, limit: int = 300) -> str:
    """Text of a stranger as one printable line of bounded length."""
    words = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * limit]).split())
    return words[:limit]
