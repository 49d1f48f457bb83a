"""Launchers, devices, offline mode."""

from __future__ import annotations

import os
from dataclasses import fields

import pytest

from gencontrol.bench.dts.main import Options
from gencontrol.cli import main
from gencontrol.errors import EnvironmentMissing, UsageError
from gencontrol.jobs.bench import variants
from gencontrol.jobs.setup.checks import download_hint
from gencontrol.jobs.setup.environment import choose_device, launched_precision, prepare
from gencontrol.registry import BENCHES


@pytest.mark.parametrize(
    ("launcher", "given", "expected"),
    [
        ("", None, None),
        ("no", None, None),
        ("no", "fp32", "fp32"),
        ("bf16", None, "bf16"),
        ("bf16", "bf16", "bf16"),
        ("fp16", "auto", "fp16"),
    ],
)
def test_accelerate_precision(
    launcher: str, given: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    assert launched_precision(given) == expected


def test_contradicting_precision_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UsageError, match="--precision bf16"):
        launched_precision("fp16")


def test_each_process_of_a_launcher_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert choose_device("auto") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("cuda") == "cuda:3"
    assert choose_device("cpu") == "cpu"


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(EnvironmentMissing, match="--device cpu"):
        choose_device("cuda")


def test_offline_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "before")  # so that the test's end restores what was there
        monkeypatch.delenv(name)
    prepare()
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"
    prepare(online=True)
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    prepare()
    assert os.environ["HF_HUB_OFFLINE"] == "0", "the user's own variable counts"


def test_hub_errors_name_the_flag_for_downloads() -> None:
    with pytest.raises(UsageError, match="--online"), download_hint("owner/name", online=False):
        raise UsageError("not in the cache.")
    for source, online in (("owner/name", True), ("./folder", False), (None, False)):
        with pytest.raises(UsageError) as caught, download_hint(source, online=online):
            raise UsageError("not in the cache.")
        assert "--online" not in str(caught.value)


def test_bench_hands_options_over(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[object] = []
    monkeypatch.setattr("gencontrol.bench.dts.main.main", lambda options: got.append(options) or 3)
    assert main(["bench", "dts", "--seeds", "3", "--sound_nfe", "90"]) == 3
    assert got == [Options(seeds=3, sound_nfe=90)]


@pytest.mark.parametrize("name", list(BENCHES))
def test_every_benchmark_says_its_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", name, "--help"]) == 0
    said = capsys.readouterr().out
    assert any(f"--{field.name.replace('_', '-')}" in said for field in fields(variants(name)["bench"]))
