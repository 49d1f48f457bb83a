"""Options made from dataclass fields: every field is an option of its command, and help says the default."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Annotated, Any, Literal

import pytest

from gencontrol.cli import main
from gencontrol.cli.generate import JobCommand, sections_of
from gencontrol.cli.table import COMMANDS, Entry
from gencontrol.config import POSITIONAL, Count, options
from gencontrol.errors import UsageError
from gencontrol.registry import ALGORITHMS, BENCHES

#: the words that choose a variant
VARIANTS = [(name, []) for name in COMMANDS if not COMMANDS[name].chooser.isupper()]
VARIANTS += [("finetune", ["--algorithm", name]) for name in ALGORITHMS]
VARIANTS += [("pretrain", [stage]) for stage in ("sound-data", "clap", "flow", "digits", "scenes", "classifier")]
VARIANTS += [("bench", [name]) for name in BENCHES]


@pytest.mark.parametrize(("name", "words"), VARIANTS, ids=lambda value: str(value))
def test_every_field_is_an_option_and_help_says_its_default(
    name: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    assert main([name, *words, "--help"]) == 0
    said = capsys.readouterr().out
    entry = COMMANDS[name]
    command = JobCommand(name, entry)
    with command.make_context(name, [*words, "--help"], resilient_parsing=True) as ctx:
        made = {p.name: p for p in command.get_params(ctx)}
    for section, kinds in sections_of(entry, words).items():
        for kind in kinds:
            for field in dataclasses.fields(kind):
                option: Any = made[f"{section}__{field.name}"]
                flags = [word for word in option.opts if word.startswith("--")]
                dashed = field.name.replace("_", "-")
                assert not flags or flags == [f"--{dashed}"] or flags == [f"--{section}.{dashed}"]
                if getattr(option, "hidden", False) or not flags:
                    continue
                line = next(line for line in said.splitlines() if line.startswith(f"│ {flags[0]} "))
                default = field.default if isinstance(kind, type) else getattr(kind, field.name)
                if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
                    assert "(default: " in line and (str(default) in line or "default: " in option.help), line


@options
class Toy:
    """The [run] section: a toy.

    Args:
        words: a list without a name.
        count: how many.
        keys: may be repeated.
        shape: two numbers.
        table: by name.
        mixed: a number or a word.
        kind: a or b (default: a, if there is one).
        mark: written by a run; not meant to be set.
        rows: lists.
    """

    words: Annotated[tuple[str, ...], POSITIONAL] = ()
    count: Count = 3
    keys: tuple[str, ...] = ()
    shape: tuple[float, float] = (1.0, 2.0)
    table: dict[str, float] | None = None
    mixed: float | Literal["auto"] = "auto"
    kind: Literal["a", "b"] | None = None
    flag: bool = False
    mark: str | None = None
    rows: tuple[tuple[int, ...], ...] = ()


SEEN: list[Any] = []


def run_toy(table: Any, start: Any) -> int:
    SEEN[:] = [table, start]
    return 7


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry("Work", "A toy.", job=f"{__name__}:run_toy", sections={"run": f"{__name__}:Toy"})
    monkeypatch.setitem(COMMANDS, "toy", entry)


def test_values_of_all_kinds(toy: None) -> None:
    words = ["toy", "x", "y", "--count", "4", "--key", "a", "--keys=b", "--shape", "3", "4.5", "--table", "u=2"]
    words += ["--table", "v=3", "--mixed", "0.5", "--kind", "b", "--flag", "--rows", "[[1, 2], [3]]"]
    assert main([*words, "--set", "run.count=5", "--dry-run"]) == 7
    given = {"words": ["x", "y"], "count": 5, "keys": ["a", "b"], "shape": [3.0, 4.5], "table": {"u": 2, "v": 3}}
    given |= {"mixed": 0.5, "kind": "b", "flag": True, "rows": [[1, 2], [3]]}
    assert SEEN[0] == {"run": given} and SEEN[1].dry_run


def test_only_what_was_given_arrives(toy: None) -> None:
    assert main(["toy"]) == 7
    assert SEEN[0] == {"run": {}} and not SEEN[1].dry_run and SEEN[1].mode == "auto"


def test_the_file_gives_way_to_options(toy: None, tmp_path: Any) -> None:
    file = tmp_path / "toy.toml"
    file.write_text('[run]\ncount = 8\nkind = "a"\n')
    assert main(["toy", "--config", str(file), "--count", "9"]) == 7
    assert SEEN[0] == {"run": {"count": 9, "kind": "a"}}


def test_the_algorithm_of_a_file_brings_its_options(tmp_path: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[run]\nalgorithm = "crd"\n')
    entry = COMMANDS["finetune"]
    assert sections_of(entry, ["--config", str(file)])["algorithm"][0].__name__ == "CrdConfig"
    assert sections_of(entry, ["--config", str(file), "--algorithm=nft"])["algorithm"][0].__name__ == "NftConfig"
    assert sections_of(entry, ["run.algorithm=rwr"])["algorithm"][0].__name__ == "RwrConfig"
    with pytest.raises(UsageError, match="Did you mean 'crd'"):
        sections_of(entry, ["--algorithm", "crdd"])


def test_a_name_of_other_trainers_keeps_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """--eval_steps of diffusers' scripts is --eval-every, not the algorithm's option of that name."""
    assert main(["finetune", "--reward", "clap", "--dry-run", "--eval_steps", "7"]) == 0
    assert "eval_every = 7" in capsys.readouterr().out


def test_help_imports_no_configuration() -> None:
    heavy = ("pydantic", "torch", "gencontrol.config", "gencontrol.jobs")
    code = (
        "import sys; from gencontrol.cli import main; main(['--help']); "
        f"print('loaded', *[m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"
