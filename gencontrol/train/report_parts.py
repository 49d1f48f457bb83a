"""Pieces that the pages of trainings and searches share: numbers for people, tiles, players, tables."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from gencontrol.train.report_charts import superscript
from gencontrol.train.report_data import RunData, Sound


def number(value: float | None, digits: int = 3) -> str:
    """Write a number for people, with a true minus sign; a missing one is a dash."""
    if value is None:
        return "–"
    if value != 0 and (abs(value) < 10**-digits or abs(value) >= 1e6):
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.replace('-', '−')}·10{superscript(int(power))}"
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """As `number`, with a plus sign."""
    text = number(value, digits)
    return text if value is None or value < 0 else f"+{text}"


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tile(name: str, value: str, detail: str, kind: str = "") -> str:
    """One number with its name and what stands behind it; `kind` "good" or "bad" colours it."""
    return (
        f'<div><dt>{escape(name)}</dt><dd><div class="value {kind}">{escape(value)}</div>'
        f'<div class="range">{escape(detail)}</div></dd></div>'
    )


def side(name: str, css: str, sound: Sound, prompt: str, before: float | None = None) -> str:
    """One sample with its reward: a player and its spectrogram, or a picture.

    Args:
        css: "base" or "tuned".
        before: reward to compare with.
    """
    reward = ""
    if sound.reward is not None:
        reward = f"reward {number(sound.reward)}"
        if before is not None:
            change = sound.reward - before
            reward += f' <b class="{"good" if change > 0 else "bad" if change < 0 else ""}">({signed(change)})</b>'
    about = escape(f"{name}: {prompt}")
    picture, player = "", ""
    if sound.png:
        kind, alt = ('class="picture" ', about) if sound.wav is None else ("", f"Spectrogram, {about}")
        picture = f'<img {kind}alt="{alt}" src="{data_uri(sound.png, "image/png")}">'
    if sound.wav is not None:
        source = data_uri(sound.wav, "audio/wav")
        player = f'<audio controls preload="metadata" aria-label="{about}" src="{source}"></audio>'
    return (
        f'<div class="side {css}"><div class="head"><strong>{escape(name)}</strong><span>{reward}</span></div>{picture}'
        f"{player}</div>"
    )


def data_uri(content: bytes, kind: str) -> str:
    """The content as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def tables(run: RunData) -> str:
    """The configuration by section, the command lines, versions and devices."""
    starts = [start for start in run.record.get("starts", []) if isinstance(start, dict)]
    commands = "".join(f"<pre>{escape(str(start.get('command', '')))}</pre>" for start in _distinct(starts))
    config = "".join(table(f"[{section}]", values) for section, values in run.config.items())
    machine: dict[str, Any] = {}
    if starts:
        newest = starts[-1]
        machine = {**newest.get("versions", {}), "commit": newest.get("commit") or "an installed package"}
        machine |= {"platform": newest.get("platform", ""), "device": newest.get("device", ""), "starts": len(starts)}
    return (
        f"<h2>Command</h2>{commands}" if commands else ""
    ) + f'<h2>Configuration</h2><div class="tables">{config}{table("Made with", machine)}</div>'


def _distinct(starts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({str(start.get("command")): start for start in starts}.values())


def table(name: str, values: Any) -> str:
    """A table of names and values; "" for anything else than a filled dictionary."""
    if not isinstance(values, dict) or not values:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_plain(value))}</td></tr>'
        for key, value in values.items()
    )
    return f"<table><caption>{escape(name)}</caption>{rows}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "–"
    return "–" if value == "" else str(value)
