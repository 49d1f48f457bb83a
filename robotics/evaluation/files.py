"""The folder of an evaluation: what was asked, one line per finished episode, and the results.

evaluation.json   settings and policies; the same command goes on, another one is refused
episodes.jsonl    appended and synced after every episode, so that an interruption loses only those under way
report.json, eval_info.json, videos/; `gencontrol report` and `gencontrol evaluate` make report.html of them
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gencontrol._version import __version__
from gencontrol.errors import UsageError
from gencontrol.files import FileLayer, disk_errors
from gencontrol.robotics.envs.worker import spec_to_json
from gencontrol.robotics.evaluation.report import SCHEMA_VERSION, EpisodeResult, EvaluationReport
from gencontrol.robotics.evaluation.videos import safe

SETTINGS, EPISODES = "evaluation.json", "episodes.jsonl"
#: settings that may differ when an evaluation goes on, because episodes do not depend on them
_FREE = ("seeds", "num_envs", "isolation", "make_timeout", "reset_timeout", "step_timeout", "videos")


def content_of(path: str) -> str | None:
    """Return a digest of a policy's files (16 hexadecimal digits); None where the path is no file or folder."""
    place = Path(path).expanduser()
    if not place.exists():
        return None
    inner = place / "final" if (place / "final" / "config.json").exists() else place
    hashed = hashlib.blake2b(digest_size=8)
    files = [inner] if inner.is_file() else sorted(p for p in inner.rglob("*") if p.is_file())
    for file in files:
        if file.suffix in (".json", ".safetensors", ".pth", ".toml", ".npz"):
            hashed.update(file.relative_to(inner).as_posix().encode())
            with open(file, "rb") as stream:
                while block := stream.read(1 << 20):
                    hashed.update(block)
    return hashed.hexdigest()


class EvaluationFolder:
    """Where an evaluation keeps its episodes.

    Args:
        settings: JSON-able; compared with those of the folder.
        policies: name → digest of its content, or None where it is not known.

    Raises:
        UsageError: the folder holds something else, or another evaluation; the message names what differs.
        DiskError: it cannot be written.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], policies: Mapping[str, str | None]) -> None:
        self.path = Path(path)
        self._layer = FileLayer()
        asked = json.loads(json.dumps({"schema_version": SCHEMA_VERSION, "settings": settings, "policies": policies}))
        file = self.path / SETTINGS
        if file.exists():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
                known, policies_before = dict(before["settings"]), dict(before["policies"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UsageError(f"'{file}' is damaged ({error}); choose another --output.") from error
            for key, value in asked["settings"].items():
                if key not in _FREE and known.get(key) != value:
                    raise UsageError(
                        f"--output {self.path} holds an evaluation with {key} = {known.get(key)}, not {value}; choose "
                        "another folder."
                    )
            for name, content in asked["policies"].items():
                if policies_before.get(name, content) != content:
                    raise UsageError(
                        f"--output {self.path} holds an evaluation of '{name}' with other weights; choose another "
                        "folder."
                    )
            asked["policies"] = {**policies_before, **asked["policies"]}
        elif self.path.exists() and (self.path.is_file() or any(self.path.iterdir())):
            raise UsageError(f"--output {self.path} exists and holds no evaluation; choose another folder.")
        self._asked: dict[str, Any] | None = asked
        self.done = self._read()

    def _begin(self) -> None:
        """Make the folder and write down what is evaluated; nothing is left behind by what is refused before."""
        if self._asked is not None:
            with disk_errors("the evaluation", self.path):
                self._layer.make_folder(self.path)
                self._layer.replace_file(self.path / SETTINGS, json.dumps(self._asked, indent=1).encode())
            self._asked = None

    def _read(self) -> dict[tuple[str, str, int], EpisodeResult]:
        """Return (policy, env_id, seed) → result; a half-written last line is cut off."""
        file = self.path / EPISODES
        if not file.exists():
            return {}
        found: dict[tuple[str, str, int], EpisodeResult] = {}
        good = []
        for line in file.read_bytes().split(b"\n"):
            try:
                table = json.loads(line)
                policy, result = table.pop("policy"), EpisodeResult.from_json(table)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # cut off by a crash: that episode is run again
            key = (policy, result.env_id, result.seed)
            if key not in found:  # never twice
                found[key] = result
                good.append(line)
        with disk_errors("the episodes", self.path):
            self._layer.replace_file(file, b"".join(line + b"\n" for line in good))
        return found

    def add(self, policy: str, result: EpisodeResult) -> None:
        """Write one finished episode down, durably."""
        self._begin()
        line = json.dumps({"policy": policy, **result.to_json()}).encode() + b"\n"
        with disk_errors("an episode", self.path), open(self.path / EPISODES, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.done[policy, result.env_id, result.seed] = result

    def write(self, name: str, content: Mapping[str, Any] | str) -> Path:
        """Write a result file atomically and return its path."""
        self._begin()
        text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False)
        path = self.path / name
        with disk_errors(name, self.path):
            self._layer.make_folder(path.parent)
            self._layer.replace_file(path, text.encode())
        return path


def write_results(folder: EvaluationFolder, reports: Sequence[EvaluationReport]) -> None:
    """Write report.json and eval_info.json (several policies: one folder each).

    Raises:
        DiskError: a file cannot be written.
    """
    table = {
        "schema_version": SCHEMA_VERSION,
        "gencontrol": __version__,
        "protocol": reports[0].protocol,
        "environments": [spec_to_json(spec) for spec in reports[0].specs],
        "policies": [report.to_json() for report in reports],
    }
    folder.write("report.json", table)
    for report in reports:
        name = "eval_info.json" if len(reports) == 1 else f"{safe(report.policy)}/eval_info.json"
        folder.write(name, report.eval_info())
