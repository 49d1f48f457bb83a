"""One visible package: links in a checkout, real files in a wheel and an sdist, seen whole by every static tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import griffe
import jedi
import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("pipelines", "rewards", "robotics")
LISTING = (
    "import gencontrol, pkgutil; from gencontrol.rewards import load_reward; "
    "print(gencontrol.__version__, len(list(pkgutil.walk_packages(gencontrol.__path__, 'gencontrol.'))), "
    "load_reward.__module__)"
)


def _run(*command: str | Path, cwd: Path, fails: bool = False) -> str:
    """Run a command that does not see this checkout; return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git tracks, links as links; bundled weights are left out to save time."""
    folder = tmp_path_factory.mktemp("clone") / "gencontrol"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if not name or name.startswith("tests/") or name.endswith(".safetensors"):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, target)
    return folder


@pytest.fixture(scope="module")
def built(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of the clone."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--sdist", "--outdir", out, clone, cwd=out)
    return out


def test_the_checkout_has_links() -> None:
    for name in LINKS:
        assert os.readlink(ROOT / "gencontrol" / name) == f"../{name}"
        assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


def test_a_wheel_and_an_sdist_hold_real_files(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if name.endswith(".py")}
        assert not any(entry.external_attr >> 28 == 0xA for entry in wheel.infolist())  # no symbolic link
        wheel.extractall(tmp_path)
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder, _, files in os.walk(ROOT / "gencontrol", followlinks=True)
        for path in (Path(folder, file) for file in files)
        if path.suffix == ".py"
    }
    assert names == sources
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {member.name.split("/", 1)[-1]: member for member in sdist.getmembers()}
    assert sources <= held.keys()
    assert not any(member.issym() or member.islnk() for member in held.values())
    where = _run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {LISTING}", cwd=tmp_path)
    assert where.split()[-1] == "gencontrol.rewards.loading"


def test_editable_and_plain_installs_behave_alike(clone: Path, tmp_path: Path) -> None:
    seen = []
    for name, option in (("plain", []), ("editable", ["-e"])):
        home = tmp_path / name
        venv.create(home, with_pip=False)
        packages = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        # the other packages come from this environment, but not this environment's own gencontrol
        for path in Path(sys.prefix, *packages.relative_to(home).parts).iterdir():
            if "gencontrol" not in path.name and path.suffix != ".pth":
                (packages / path.name).symlink_to(path)
        python = home / "bin" / "python"
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
        _run(*install, "--no-build-isolation", *option, clone, cwd=tmp_path)
        seen.append(_run(python, "-c", LISTING, cwd=tmp_path))
        assert "Steer" in _run(home / "bin" / "gencontrol", "--help", cwd=tmp_path)
    assert seen[0] == seen[1]


def test_a_checkout_without_links_is_one_clear_line(clone: Path, tmp_path: Path) -> None:
    """What `git clone -c core.symlinks=false` leaves: text files that hold the name of the folder."""
    bare = tmp_path / "bare"
    shutil.copytree(clone, bare, symlinks=True)
    for name in LINKS:
        (bare / "gencontrol" / name).unlink()
        (bare / "gencontrol" / name).write_text(f"../{name}")
    said = _run(sys.executable, "-m", "gencontrol", "--help", cwd=bare, fails=True).strip()
    assert said.count("\n") == 0 and "core.symlinks" in said and "gencontrol/pipelines" in said
    refused = _run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", bare, cwd=tmp_path, fails=True
    )
    assert sum("core.symlinks" in line for line in refused.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("gencontrol.rewards.load_reward", "rewards/loading.py"),
        ("gencontrol.robotics.evaluate.evaluate", "robotics/evaluate.py"),
        ("gencontrol.pipelines.TextToImagePipeline", "pipelines/text_to_image.py"),
        ("gencontrol.sampling.sample", "gencontrol/sampling/loop.py"),
    ],
)
def test_static_tools_find_it(name: str, home: str) -> None:
    """Go-to-definition by jedi, documentation by griffe."""
    module, _, attribute = name.rpartition(".")
    source = f"from {module} import {attribute}\n{attribute}\n"
    script = jedi.Script(source, path=ROOT / "somewhere.py", project=jedi.Project(ROOT, sys_path=[str(ROOT)]))
    found = script.goto(2, 1, follow_imports=True)
    assert [(ROOT / home).samefile(definition.module_path) for definition in found] == [True]
    documented = griffe.load(name, search_paths=[ROOT], resolve_aliases=True, allow_inspection=False)
    assert documented.docstring is not None and documented.docstring.value
