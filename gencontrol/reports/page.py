"""Pages of reports: one self-contained document, its look, and the pieces that all reports share."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

#: Ten shades of a value, from the paper to the full colour.
_SHADES = "".join(
    f".v{i} {{ fill: {mix}; background: {mix}; }}\n"
    for i, mix in enumerate(f"color-mix(in srgb, var(--tuned) {4 + 10 * i}%, var(--card))" for i in range(10))
)

STYLE = (
    """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2327; --soft: #5b646b; --rule: #dfdcd3; --grid: #ece9e1;
  --tuned: #0b6e78; --base: #8a5a00; --train: #54606b; --good: #14713d; --bad: #a3312b; --wash: #eef5f4; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181a; --card: #1b2124; --ink: #e8e6e0; --soft: #a7b0b5; --rule: #333b3f; --grid: #283033;
  --tuned: #57c7cf; --base: #e0a94a; --train: #97a4ad; --good: #6fce97; --bad: #f08f87; --wash: #1c2a2b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 44px; }
h1, h2 { font-family: "Iowan Old Style", Charter, "Palatino Linotype", Palatino, Georgia, "DejaVu Serif", serif;
  font-weight: 600; letter-spacing: -0.01em; line-height: 1.2; }
h1 { font-size: clamp(1.8rem, 4.5vw, 2.6rem); margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.5rem; margin: 52px 0 6px; }
h3 { font-size: 1.02rem; margin: 0 0 10px; font-weight: 600; line-height: 1.4; overflow-wrap: anywhere; }
p { margin: 6px 0 12px; max-width: 70ch; }
.eyebrow { color: var(--tuned); font-size: .8rem; font-weight: 650; letter-spacing: .09em;
  text-transform: uppercase; margin: 0 0 8px; }
.lead, .note, footer { color: var(--soft); }
.note { font-size: .92rem; }
a { color: var(--tuned); }
code, pre { font: .875em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px;
  overflow-x: auto; margin: 10px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 1px;
  margin: 28px 0 8px;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; padding: 0; }
.numbers > div { background: var(--card); padding: 18px 20px 16px; }
.numbers dt { color: var(--soft); font-size: .86rem; }
.numbers dd { margin: 2px 0 0; }
.numbers .value { font-size: 1.9rem; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; line-height: 1.25; }
.numbers .range { color: var(--soft); font-size: .88rem; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: 20px;
  margin: 16px 0; }
.wide { margin: 16px 0 20px; }
.chart { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 16px 16px 10px; min-width: 0; }
.chart figcaption { font-weight: 600; font-size: .98rem; }
.chart svg { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible; }
.chart text { fill: var(--soft);
  font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
.chart .name { fill: var(--ink); }
.grid { stroke: var(--grid); } .axis { stroke: var(--soft); }
.tuned { --c: var(--tuned); } .base { --c: var(--base); } .train, .faint { --c: var(--train); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.base { stroke-dasharray: 6 5; } .line.faint { opacity: .3; stroke-width: 1; }
.band { fill: var(--c); opacity: .16; } .bar { stroke: var(--c); stroke-width: 7; opacity: .25;
  stroke-linecap: round; }
.dot { fill: var(--card); stroke: var(--c); stroke-width: 2; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 0; padding: 0;
  font-size: .86rem; color: var(--soft); }
.legend .key { display: inline-block; width: 18px; height: 0; border-top: 3px solid var(--c);
  margin-right: 7px; vertical-align: middle; }
.legend .base .key { border-top-style: dashed; } .legend .faint .key { opacity: .4; }
.pair { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px;
  margin: 14px 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 22px; }
.side { min-width: 0; }
.side .head { display: flex; justify-content: space-between; align-items: baseline; gap: 12px;
  margin-bottom: 6px; font-size: .92rem; }
.side .head strong { color: var(--c); }
.side .head span { color: var(--soft); font-variant-numeric: tabular-nums; }
.side img { display: block; width: 100%; height: 128px; object-fit: fill; border-radius: 6px;
  background: #08060f; image-rendering: auto; }
.side audio { width: 100%; margin-top: 8px; height: 40px; }
.side video { display: block; width: 100%; max-width: 420px; border-radius: 6px; background: #08060f; }
table.rows th { width: auto; } .rows td, .rows th { padding-right: 18px; }
.rows td:not(:last-child), .rows th { white-space: nowrap; overflow-wrap: normal; }
.side img.picture { width: auto; max-width: min(100%, 320px); height: auto; object-fit: contain; }
.scroll { overflow-x: auto; } table.grid { width: auto; } table.grid th { width: auto; max-width: 190px; }
table.grid th[scope="row"] { color: var(--c); font-weight: 600; white-space: nowrap; }
table.grid img { display: block; width: 160px; border-radius: 6px; image-rendering: pixelated; }
table.grid td span { color: var(--soft); font-size: .84rem; }
.column { fill: var(--c); opacity: .5; }
.tree .note { margin: 2px 0 4px; }
.edge { fill: none; stroke: var(--soft); opacity: .45; } .edge.best { stroke: var(--base); opacity: 1; }
.node { stroke: var(--soft); stroke-width: .8; } .node.none { fill: var(--card); stroke: var(--bad); }
.node.best { stroke: var(--base); stroke-width: 2.2; }
.chart .mark { fill: var(--base); font-weight: 650; }
.shades { white-space: nowrap; margin: 0 3px; }
.shade { display: inline-block; width: 15px; height: 11px; vertical-align: -1px; }
.legend .solid.key { border-top-style: solid; }
.gap { margin: 30px 0 0; }
.tables { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 28px;
  align-items: start; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; font-weight: 600; padding: 6px 0; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-top: 1px solid var(--rule);
  font-weight: 400; overflow-wrap: anywhere; }
th { color: var(--soft); width: 50%; } td { font-variant-numeric: tabular-nums; }
details { margin: 16px 0; } summary { cursor: pointer; color: var(--tuned); font-weight: 600; padding: 6px 0; }
.warn { background: var(--wash); border-left: 4px solid var(--base); border-radius: 6px; padding: 10px 16px;
  margin: 18px 0; }
.warn p { margin: 2px 0; }
footer { padding-top: 36px; padding-bottom: 48px; font-size: .88rem; }
:focus-visible { outline: 3px solid var(--tuned); outline-offset: 2px; border-radius: 4px; }
@media print { body { background: #fff; } .pair, .chart { break-inside: avoid; } audio { display: none; } }
"""
    + _SHADES
)

#: One sound at a time.
SCRIPT = """
document.addEventListener("play", event => {
  for (const player of document.querySelectorAll("audio")) if (player !== event.target) player.pause();
}, true);
"""

#: Nothing may be fetched: a page that someone mails works, and tells nobody that it was opened.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


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


def superscript(number: int) -> str:
    """Write a whole number in superscript digits."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


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


def data_uri(content: bytes, kind: str) -> str:
    """The content as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


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


def page(title: str, header: str, body: str, footer: str) -> str:
    """Return the whole HTML document."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header>{header}</header>\n<main>\n{body}\n</main>\n<footer>{footer}</footer>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
