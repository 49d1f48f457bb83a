"""Reading prompts: one per line (txt), a "prompt" key (jsonl), a "prompt" column (csv), or the bundled grammar."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from gencontrol.errors import UsageError

MAX_LENGTH = 10_000  # characters; a longer line is a wrong file, not a prompt


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file in order, blank lines left out.

    Raises:
        UsageError: missing, empty, not UTF-8, a control character, or a malformed row (with its line number).
    """
    file = Path(path).expanduser()
    if not file.exists():
        raise UsageError(f"prompt file '{file}' does not exist; check the path.")
    if file.is_dir():
        raise UsageError(f"prompt file '{file}' is a folder; name a .txt, .jsonl or .csv file.")
    readers: dict[str, Callable[[str, Path], Iterable[tuple[int, str]]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".csv": _csv,
        ".tsv": _csv,
    }
    rows = list(readers.get(file.suffix.lower(), _lines)(_decode(file), file))
    for number, prompt in rows:
        _check(prompt, number, file)
    if not rows:
        raise UsageError(f"prompt file '{file}' holds no prompt; write one per line.")
    return [prompt for _, prompt in rows]


#: Seed of each split's prompts.  The defaults of fine-tuning were chosen on the test prompts of seed 0, so that seed
#: would flatter every run; those of seed 1 chose nothing.
_SEEDS = {"train": 0, "test": 1}


def bundled_prompts(split: Literal["train", "test"], count: int, medium: str = "audio") -> list[str]:
    """Return `count` prompts of the bundled sound or scene grammar; "test" describes what training never had."""
    from gencontrol.recipes.scenes.data.corpus import sample_captions as scenes
    from gencontrol.recipes.sound.data.grammar import sample_captions as sounds

    if medium == "image":
        return scenes(count, split=split, seed=_SEEDS[split])
    return sounds(count, _SEEDS[split], split)


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"prompt file '{file}', line {line}: not UTF-8; save the file as UTF-8.") from error


def _lines(text: str, _file: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def _jsonl(text: str, file: Path) -> Iterator[tuple[int, str]]:
    for number, line in _lines(text, file):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"prompt file '{file}', line {number}: not JSON ({error.msg}); one object a line."
            ) from error
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"prompt file '{file}', line {number}: no text under the key \"prompt\"; add it.")
        yield number, prompt.strip()


def _csv(text: str, file: Path) -> Iterator[tuple[int, str]]:
    rows = csv.reader(io.StringIO(text), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        column = next((i for i, name in enumerate(header) if name in ("prompt", "caption", "text")), None)
        if column is None:
            raise UsageError(f"prompt file '{file}', line 1: no column 'prompt'; its columns are: {', '.join(header)}.")
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if len(row) <= column or not row[column].strip():
                raise UsageError(
                    f"prompt file '{file}', line {rows.line_num}: no prompt in this row; fill or delete it."
                )
            yield rows.line_num, row[column].strip()
    except csv.Error as error:
        raise UsageError(f"prompt file '{file}', line {rows.line_num}: {error}; mend the row.") from error


def _check(prompt: str, number: int, file: Path) -> None:
    where = f"prompt file '{file}', line {number}"
    if len(prompt) > MAX_LENGTH:
        raise UsageError(f"{where}: {len(prompt)} characters; a prompt has at most {MAX_LENGTH}.")
    bad = next((c for c in prompt if unicodedata.category(c) == "Cc" and c not in "\t\n\r"), None)
    if bad is not None:
        raise UsageError(f"{where}: control character U+{ord(bad):04X}; remove it.")
