"""What a report shows, read from a run folder; needs neither torch nor the trainer, and survives a damaged file."""

from __future__ import annotations

import inspect
import io
import json
import math
import re
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from gencontrol import registry
from gencontrol.config import load_toml
from gencontrol.errors import UsageError

#: Seconds of a sound that are put into the page where all sounds together would be too large for it.
SHORT_S, BUDGET_BYTES = 10.0, 24 * 2**20

#: characters that fit beside an axis
_LONGEST_UNIT = 40

_STEP = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Sound:
    """One sample: a wav, perhaps its picture, or a picture alone; and its reward where it was scored alone."""

    wav: bytes | None
    png: bytes | None = None
    reward: float | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with the sample of the base model and of the tuned one (either may be missing).

    Args:
        place: of its gain among those of all evaluation samples, e.g. "median"; "" where it was not chosen by that.
    """

    prompt: str
    base: Sound | None = None
    tuned: Sound | None = None
    place: str = ""


class About(NamedTuple):
    """What pages and cards say about an algorithm or a reward.

    Args:
        title: its name for people.
        paper: address of the paper, or "".
        summary: one sentence, or "".
        medium: "image", "audio", "actions", "any", or "".
    """

    title: str
    paper: str = ""
    summary: str = ""
    medium: str = ""


def describe(thing: Any) -> dict[str, str]:
    """Return what a class, or an object of it, says about itself, as run.json keeps it; see `About`."""
    text = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ").replace("`", "")
    name = getattr(thing, "__name__", type(thing).__name__)
    found = {field: value if isinstance(value := getattr(thing, field, ""), str) else "" for field in About._fields}
    paper = found["paper"]
    if paper.lower().startswith("arxiv:"):
        found["paper"] = f"https://arxiv.org/abs/{paper[6:].strip()}"
    summary = found["summary"] or text
    return {**found, "title": found["title"] or summary.rstrip(".") or name, "summary": summary}


def about(algorithm: str, rewards: Sequence[str], known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what run.json keeps about the algorithm and the rewards of a job, so that no reader has to import them.

    Args:
        algorithm: registered name or `package.module:Class`; "" for none.
        rewards: specs, perhaps with a weight.
        known: name → object, for what the job was given as an object.
    """
    tables = {"algorithm": registry.ALGORITHMS | registry.TRAIN | registry.PRETRAIN, "reward": registry.REWARDS}
    found: dict[str, Any] = {}
    for kind, name in [("algorithm", algorithm), *(("reward", parse_weight(spec)[0]) for spec in rewards)]:
        thing = (known or {}).get(name)
        try:
            if thing is None and (name in tables[kind] or ":" in name):
                thing = registry.find(tables[kind], name, kind)
        except (UsageError, ImportError):
            continue  # an extra that is not installed: the name alone is shown
        if thing is not None:
            found.setdefault(kind, {})[name] = describe(thing)
    return found


def parse_weight(spec: str) -> tuple[str, float]:
    """Return name and weight of a reward's spec, 1 where it has none."""
    name, _, last = spec.rpartition(":")
    try:
        return (name, float(last)) if name else (spec, 1.0)
    except ValueError:
        return spec, 1.0


@dataclass(frozen=True)
class RunData:
    """A run folder as read.

    Args:
        path: the folder.
        config: config.toml by section.
        record: run.json: kind, starts (command, versions, device).
        rows: records of metrics.jsonl in order.
        pairs: sounds of the last evaluation.
        pairs_step: its step.
        cut_s: seconds that sounds were cut to, or None.
        final: whether final/ is there.
    """

    path: Path
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    pairs: Sequence[Pair] = ()
    pairs_step: int = 0
    cut_s: float | None = None
    final: bool = False

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def steps(self) -> int:
        """The steps that were asked for."""
        return int(self.config.get("train", {}).get("steps", self.step))

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def settings(self) -> Mapping[str, Any]:
        """The section [run]."""
        return self.config.get("run", {})

    @property
    def rewards(self) -> list[str]:
        """Specs of the rewards."""
        return [str(spec) for spec in self.settings.get("reward", [])]

    @property
    def starts(self) -> list[Mapping[str, Any]]:
        """What was recorded at each start: command, versions, device."""
        found = self.record.get("starts", [])
        return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []

    @property
    def commands(self) -> list[str]:
        """The different command lines in order."""
        return list(dict.fromkeys(str(start.get("command", "")) for start in self.starts))

    @property
    def version(self) -> str:
        """The version of gencontrol that made it, or ""."""
        return str(dict(self.starts[-1].get("versions", {})).get("gencontrol", "")) if self.starts else ""

    @property
    def machine(self) -> dict[str, Any]:
        """Versions and device of the newest start."""
        if not self.starts:
            return {}
        newest = self.starts[-1]
        made = {**newest.get("versions", {}), "commit": newest.get("commit") or "an installed package"}
        return made | {name: newest.get(name, "") for name in ("platform", "device")} | {"starts": len(self.starts)}

    def about(self, kind: str, name: str) -> About:
        """What is known of the "algorithm" or "reward" of this name.

        What the job recorded comes first, then our own classes; user code that a folder names is never imported here,
        for the folder may come from a stranger.
        """
        recorded = self.record.get("about")
        entry = recorded.get(kind, {}).get(name) if isinstance(recorded, dict) else None
        if not isinstance(entry, dict) and ":" not in name:
            found = about(name, ()) if kind == "algorithm" else about("", (name,))
            entry = found.get(kind, {}).get(name)
        if not isinstance(entry, dict):
            return About(name)
        return About(**{field: str(entry.get(field, "")) for field in About._fields})

    @property
    def unit(self) -> str:
        """What the reward measures, for axes."""
        names = [parse_weight(spec)[0] for spec in self.rewards]
        if not names:
            return "reward"
        if len(names) > 1:
            return "weighted reward"
        title = self.about("reward", names[0]).title
        return title if len(title) <= _LONGEST_UNIT else names[0]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric."""
        points = [(float(row["step"]), row[name]) for row in self.rows if is_number(row.get(name))]
        return [x for x, _ in points], [float(y) for _, y in points]

    def last(self, name: str) -> float | None:
        """The newest finite value of a metric, or None."""
        values = self.series(name)[1]
        return values[-1] if values else None

    def names(self) -> list[str]:
        """All metrics that hold a number, in order of first appearance."""
        return list(dict.fromkeys(key for row in self.rows for key, value in row.items() if is_number(value)))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number (and not a boolean)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(run_dir: str | Path) -> RunData:
    """Read a run folder.

    Raises:
        UsageError: the folder is not there or holds no run.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UsageError(f"run folder '{path}' does not exist; check the path.")
    if not any((path / name).exists() for name in ("metrics.jsonl", "config.toml", "run.json")):
        raise UsageError(f"'{path}' is no run folder: it has neither metrics.jsonl nor config.toml; check the path.")
    config = load_toml(path / "config.toml") if (path / "config.toml").exists() else {}
    step, pairs = _read_pairs(path / "samples")
    pairs, cut = _within_budget(pairs)
    return RunData(
        path=path,
        config={key: value for key, value in config.items() if isinstance(value, dict)},
        record=read_json(path / "run.json", {}),
        rows=_read_rows(path / "metrics.jsonl"),
        pairs=pairs,
        pairs_step=step,
        cut_s=cut,
        final=(path / "final").is_dir(),
    )


def read_json(path: Path, default: Any) -> Any:
    """Return the content of a JSON file of the default's type; the default where it is damaged or absent."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default
    return found if isinstance(found, type(default)) else default


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Complete lines in order; a step that is logged twice counts with its last line."""
    rows: dict[int, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a torn line of a run that was killed
        if isinstance(row, dict) and is_number(row.get("step")):
            rows[int(row["step"])] = row
    return [rows[step] for step in sorted(rows)]


def _read_pairs(folder: Path) -> tuple[int, list[Pair]]:
    """Sounds of the newest evaluation that has any."""
    found = [(int(match[1]), entry) for entry in folder.glob("step_*") if (match := _STEP.fullmatch(entry.name))]
    for step, entry in sorted(found, reverse=True):
        if pairs := _compared(entry) or _captioned(entry):
            return step, pairs
    return 0, []


def _compared(folder: Path) -> list[Pair]:
    """Base and tuned sounds with prompts.json."""
    pairs, rows = [], [row if isinstance(row, dict) else {} for row in read_json(folder / "prompts.json", [])]
    chosen = any(row.get("place") for row in rows)
    for index, row in enumerate(rows):
        if chosen and not row.get("place"):
            continue  # one of the fixed ones, which show the course of training
        sounds = {side: _sound(folder, f"{side}_{index:02d}", row.get(f"{side}_reward")) for side in ("base", "tuned")}
        if any(sounds.values()):
            pairs.append(Pair(str(row.get("prompt", "")), sounds["base"], sounds["tuned"], str(row.get("place", ""))))
    return pairs


def _captioned(folder: Path) -> list[Pair]:
    """Sounds of a pretraining, with captions.txt."""
    captions = {}
    if (folder / "captions.txt").exists():
        for line in (folder / "captions.txt").read_text(encoding="utf-8", errors="replace").splitlines():
            number, _, text = line.partition(" ")
            captions[number] = text
    pairs = []
    for file in sorted(folder.glob("*.wav")):
        number = file.stem.rpartition("_")[2]
        pairs.append(Pair(captions.get(number, file.stem), None, _sound(folder, file.stem, None)))
    return pairs


def _sound(folder: Path, stem: str, reward: Any) -> Sound | None:
    wav, png = folder / f"{stem}.wav", folder / f"{stem}.png"
    sound = wav.read_bytes() if wav.is_file() else None
    picture = png.read_bytes() if png.is_file() else None
    if sound is None and picture is None:
        return None
    return Sound(sound, picture, float(reward) if is_number(reward) else None)


def _within_budget(pairs: list[Pair]) -> tuple[list[Pair], float | None]:
    """Cut sounds to `SHORT_S` seconds where all together would exceed the page's budget."""
    sounds = [sound for pair in pairs for sound in (pair.base, pair.tuned) if sound is not None]
    if sum(len(sound.wav or b"") for sound in sounds) <= BUDGET_BYTES:
        return pairs, None
    short = {id(sound): Sound(sound.wav and cut_wav(sound.wav, SHORT_S), sound.png, sound.reward) for sound in sounds}
    return [
        replace(p, base=short[id(p.base)] if p.base else None, tuned=short[id(p.tuned)] if p.tuned else None)
        for p in pairs
    ], SHORT_S


def cut_wav(data: bytes, seconds: float) -> bytes:
    """Return the first seconds of a PCM wav file; anything else is returned as it is."""
    try:
        with wave.open(io.BytesIO(data)) as source:
            settings, frames = source.getparams(), source.readframes(int(seconds * source.getframerate()))
    except (wave.Error, EOFError):
        return data
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setparams(settings)
        file.writeframes(frames)
    return target.getvalue()
