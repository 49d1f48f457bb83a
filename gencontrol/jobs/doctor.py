"""`gencontrol doctor`: what this machine offers, what is missing and what each missing piece disables."""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from gencontrol.config import build, options
from gencontrol.jobs.setup.settings import Start
from gencontrol.weights import BUNDLED, check_manifest

#: (distribution, extra or "" for the core, what its absence disables)
PACKAGES = (
    ("torch", "", "everything"),
    ("numpy", "", "everything"),
    ("scipy", "", "set rewards"),
    ("safetensors", "", "loading and saving weights"),
    ("jaxtyping", "", "everything"),
    ("diffusers", "", "diffusers models"),
    ("transformers", "", "text encoders and CLAP"),
    ("peft", "", "LoRA (--lora-rank 0 works without)"),
    ("huggingface_hub", "", "models from the hub"),
    ("typer", "", "the command line"),
    ("rich", "", "coloured help"),
    ("tensorboard", "", "--track tensorboard (--track none works without)"),
    ("soundfile", "audio", "flac, mp3 and ogg references (wav works without)"),
    ("torchsde", "audio", "Stable Audio's own sampler"),
    ("laion-clap", "clap", "LAION checkpoints of CLAP"),
    ("rapidocr-onnxruntime", "ocr", "--reward ocr on other pictures than the bundled scenes"),
    ("open_clip_torch", "image", "open_clip checkpoints, and with them --reward hps"),
    ("torchvision", "image", "open_clip checkpoints"),
    ("pillow", "", "pictures"),
    ("gymnasium", "robotics", "robot environments"),
    ("mujoco", "robotics", "robot simulation"),
    ("gymnasium-robotics", "robotics", "PointMaze and Fetch"),
    ("av", "robotics", "videos of robots"),
    ("h5py", "robotics", "robomimic data sets"),
    ("pyarrow", "robotics", "LeRobot data sets"),
    ("scikit-learn", "bench", "peers in the benchmarks"),
)


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis; `state` is "ok", "note" (optional, absent) or "fault"."""

    group: str
    name: str
    state: str
    detail: str


@options
class DoctorConfig:
    """The [run] section.

    Args:
        json: print JSON.
    """

    json: bool = False


def run(table: Mapping[str, Mapping[str, Any]], start: Start) -> int:
    """Print the diagnosis and return 0, or 6 where a needed piece is missing or damaged."""
    checks = list(diagnose())
    healthy = all(check.state != "fault" for check in checks)
    if build(DoctorConfig, table["run"], "run").json:
        print(json.dumps({"healthy": healthy, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _print(checks)
        print("\nAll that is needed is here." if healthy else "\nMend the lines marked ✗, then run this again.")
    return 0 if healthy else 6


def diagnose() -> Iterator[Check]:
    """Yield the checks in order of reading."""
    yield from _system()
    yield from _packages()
    yield from _devices()
    yield from _robots()
    yield from _bundled()
    yield from _writing()


def _print(checks: list[Check]) -> None:
    marks = {"ok": "✓", "note": "·", "fault": "✗"}
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            print(f"\n{group}")
        print(f"  {marks[check.state]} {check.name:<18} {check.detail}")


def _system() -> Iterator[Check]:
    version = platform.python_version()
    good = sys.version_info >= (3, 11)
    yield Check(
        "System", "python", "ok" if good else "fault", version if good else f"{version}; 3.11 or newer is needed"
    )
    yield Check("System", "platform", "ok", f"{platform.system()} {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    set_by = os.environ.get("OMP_NUM_THREADS")
    yield Check("System", "CPU", "ok", f"{usable} cores" + (f", OMP_NUM_THREADS={set_by}" if set_by else ""))


def _packages() -> Iterator[Check]:
    for name, extra, use in PACKAGES:
        group = "Packages" if not extra else "Optional packages"
        try:
            yield Check(group, name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            install = f"pip install {name}" if not extra else f'pip install "gencontrol[{extra}]"'
            yield Check(group, name, "note" if extra else "fault", f"missing, needed for {use}; {install}")


def _devices() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("Devices", "torch", "fault", f"cannot be imported: {error}; reinstall torch")
        return
    yield Check("Devices", "torch threads", "ok", str(torch.get_num_threads()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            detail = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"
            yield Check("Devices", f"cuda:{index}", "ok", detail)
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        yield Check("Devices", "CUDA", "note", f"none ({built}): training runs on the CPU")
    egl = ctypes.util.find_library("EGL")
    missing = "no libEGL: rendering of simulators without a screen is off; apt-get install libegl1"
    yield Check("Devices", "EGL", "ok" if egl else "note", egl or missing)


def _robots() -> Iterator[Check]:
    """Which environments run: each is made and stepped in a process of its own (a few seconds in all)."""
    from gencontrol.robotics.envs.probe import probe

    for found in probe():
        yield Check("Robots", found.name, "ok" if found.works else "note", found.detail)


def _bundled() -> Iterator[Check]:
    for name, use in (
        ("text_to_audio", "--model bundled"),
        ("clap", "--reward clap"),
        ("attributes", "quality checks"),
        ("digits", "ClassToImagePipeline and --reward digit-class"),
        ("text_to_image", "--model bundled-image"),
        ("scene_reader", "--reward ocr and compositional"),
        ("scene_judge", "quality checks of pictures"),
    ):
        present = any((BUNDLED / name).rglob("*.safetensors"))
        detail = (
            "present"
            if present
            else f"missing, needed for {use}; reinstall gencontrol or make it with `gencontrol pretrain`"
        )
        yield Check("Bundled weights", name, "ok" if present else "fault", detail)
    try:
        faults = check_manifest()
    except FileNotFoundError:
        yield Check("Bundled weights", "checksums", "note", "no manifest.json to compare with")
        return
    except (ValueError, KeyError, TypeError) as error:
        yield Check(
            "Bundled weights", "checksums", "fault", f"manifest.json is unreadable ({error}); reinstall gencontrol"
        )
        return
    detail = "; ".join(faults[:5]) + "; reinstall gencontrol" if faults else "all files intact"
    yield Check("Bundled weights", "checksums", "fault" if faults else "ok", detail)


def _writing() -> Iterator[Check]:
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, folder, needed in (
        ("this folder", Path.cwd(), True),
        ("temporary folder", Path(tempfile.gettempdir()), True),
        ("hub cache", cache, False),
    ):
        while not folder.exists():
            folder = folder.parent
        try:
            with tempfile.NamedTemporaryFile(dir=folder):
                free = shutil.disk_usage(folder).free / 2**30
            yield Check("Writing", name, "ok", f"{folder} is writable, {free:.1f} GiB free")
        except OSError as error:
            state = "fault" if needed else "note"
            yield Check("Writing", name, state, f"{folder} is not writable ({error.strerror}); choose another folder")
