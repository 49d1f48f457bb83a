"""`doctor`: exit codes, JSON, and the manifest of the bundled weights."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from gencontrol.cli import main
from gencontrol.jobs import doctor
from gencontrol.weights import BUNDLED, check_manifest, write_manifest

BUNDLES = ("attributes", "clap", "digits", "scene_judge", "scene_reader", "text_to_audio", "text_to_image")


def _healthy_bundle(folder: Path) -> Path:
    for name in BUNDLES:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(name.encode())
    write_manifest(folder)
    return folder


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small bundle with a manifest, in place of the installed one."""
    folder = _healthy_bundle(tmp_path / "bundled")
    monkeypatch.setattr(doctor, "_robots", lambda: iter(()))  # seconds; see tests/robotics/envs/test_envs.py
    monkeypatch.setattr(doctor, "BUNDLED", folder)
    monkeypatch.setattr(doctor, "check_manifest", lambda: check_manifest(folder))
    return folder


def test_all_is_well(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in (*BUNDLES, "python", "torch", "EGL", "all files intact", "is writable", "All that is needed is here."):
        assert part in out


def test_json_tells_every_fault(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bundle / "clap" / "model.safetensors").write_bytes(b"clbp")
    (bundle / "attributes" / "model.safetensors").unlink()
    assert main(["doctor", "--json"]) == 6
    table = json.loads(capsys.readouterr().out)
    assert table["healthy"] is False
    faults = {check["name"]: check["detail"] for check in table["checks"] if check["state"] == "fault"}
    assert set(faults) == {"attributes", "checksums"}
    assert "clap/model.safetensors was altered" in faults["checksums"]
    assert "attributes/model.safetensors is missing" in faults["checksums"]


def test_a_missing_core_package_is_a_fault_and_an_extra_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("peft", "gymnasium"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    states = {check.name: check for check in doctor._packages()}
    assert states["peft"].state == "fault" and "--lora-rank 0" in states["peft"].detail
    assert states["gymnasium"].state == "note" and 'pip install "gencontrol[robotics]"' in states["gymnasium"].detail
    assert states["torch"].state == "ok"


def test_every_bundled_model_is_listed() -> None:
    """All folders with weights of this package, so that a new one cannot be forgotten."""
    folders = {path.name for path in BUNDLED.iterdir() if any(path.rglob("*.safetensors"))} - {"reference"}
    assert {check.name for check in doctor._bundled()} - {"checksums"} == folders == set(BUNDLES)


def test_a_damaged_manifest_is_a_fault(bundle: Path) -> None:
    (bundle / "manifest.json").write_text("{}")
    assert [check.state for check in doctor._bundled()][-1] == "fault"
    (bundle / "manifest.json").unlink()
    assert [check.state for check in doctor._bundled()][-1] == "note"


def test_a_folder_that_cannot_be_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    assert main(["doctor"]) == 6
    assert "is not writable (Permission denied)" in capsys.readouterr().out


def test_manifest_covers_every_file(tmp_path: Path) -> None:
    folder = _healthy_bundle(tmp_path / "bundled")
    table = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(table) == [f"{name}/model.safetensors" for name in BUNDLES]
    assert check_manifest(folder) == []


def test_the_weights_of_this_checkout_are_those_of_the_manifest() -> None:
    remedy = 'after a change on purpose: python -c "from gencontrol.weights import write_manifest as w; w()"'
    assert check_manifest() == [], remedy
