"""Pieces that the pages of trainings and searches share: numbers for people, tiles, players, tables."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from gencontrol.reports.data import RunData, Sound
from gencontrol.reports.page import data_uri, duration, number, signed, table, tile

__all__ = ["data_uri", "duration", "number", "side", "signed", "table", "tables", "tile"]


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
