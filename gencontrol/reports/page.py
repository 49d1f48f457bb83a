"""Pages of reports: templates become one self-contained document; and how they write numbers for people."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from gencontrol.files import FileLayer, disk_errors

#: colour → (on light paper, on dark paper); c0 to c7 are the curves of charts with many methods
PALETTE = {
    "paper": ("#fbfaf7", "#14181a"),
    "card": ("#ffffff", "#1b2124"),
    "ink": ("#1d2327", "#e8e6e0"),
    "soft": ("#5b646b", "#a7b0b5"),
    "rule": ("#dfdcd3", "#333b3f"),
    "grid": ("#ece9e1", "#283033"),
    "wash": ("#eef5f4", "#1c2a2b"),
    "tuned": ("#0b6e78", "#57c7cf"),
    "base": ("#8a5a00", "#e0a94a"),
    "train": ("#54606b", "#97a4ad"),
    "good": ("#14713d", "#6fce97"),
    "bad": ("#a3312b", "#f08f87"),
    "c0": ("#0b6e78", "#57c7cf"),
    "c1": ("#c2570c", "#f2a46b"),
    "c2": ("#4453b8", "#9aa6f5"),
    "c3": ("#a02763", "#ee8fbd"),
    "c4": ("#3c7a1e", "#9bd17c"),
    "c5": ("#8a5a00", "#e0a94a"),
    "c6": ("#7a3fa8", "#caa0ef"),
    "c7": ("#54606b", "#97a4ad"),
}

#: Nothing may be fetched: a page that someone mails works, and tells nobody that it was opened.
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Tile(NamedTuple):
    """One number with its name and what stands behind it; `kind` "good" or "bad" colours it."""

    name: str
    value: str
    detail: str
    kind: str = ""


def number(value: float | None, digits: int = 3) -> str:
    """Write a number for people, with a true minus sign; a missing one (None or NaN) is a dash."""
    if value is None or value != value:
        return "–"
    if value != 0 and (abs(value) < 10**-digits or abs(value) >= 1e6):
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.replace('-', '−')}·10{superscript(int(power))}"
    return f"{value:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """As `number`, with a plus sign."""
    text = number(value, digits)
    return text if value is None or not value >= 0 else f"+{text}"


def superscript(number: int) -> str:
    """Write a whole number in superscript digits."""
    return str(number).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(share: float | None, digits: int = 0) -> str:
    """Write a share of 1 in percent; a missing one is a dash."""
    return "–" if share is None or share != share else f"{100 * share:.{digits}f} %"


def grouped(value: float) -> str:
    """Write a whole number with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u2009")


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def data_uri(content: bytes, kind: str) -> str:
    """The content as an address that needs no file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def plain(value: Any) -> str:
    """Write a value of a configuration: lists with commas, an empty one as a dash."""
    text = ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
    return text or "–"


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("gencontrol.reports"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters.update(number=number, signed=signed, data_uri=data_uri, plain=plain)
    made.globals.update(palette=PALETTE, policy=POLICY)
    return made


ENVIRONMENT = _environment()


def render(template: str, **values: Any) -> str:
    """Fill a template of this package in; all values are escaped, except drawings, which write themselves."""
    return ENVIRONMENT.get_template(template).render(**values)


def write(path: Path, text: str) -> Path:
    """Replace a file atomically and return its path.

    Raises:
        DiskError: it cannot be written.
    """
    with disk_errors(path.name, path.parent):
        FileLayer().replace_file(path, text.encode())
    return path
