"""Type-check gencontrol as the one package that it is when installed.

mypy cannot follow setup.cfg's `package_dir` mapping, so a tree of links of the installed shape is built first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "types" / "gencontrol"


def main() -> int:
    """Link the sources into build/types/gencontrol and run mypy over the package."""
    shutil.rmtree(TREE, ignore_errors=True)
    TREE.mkdir(parents=True)
    for entry in (ROOT / "gencontrol").iterdir():
        if entry.name not in ("__pycache__", "bundled"):
            (TREE / entry.name).symlink_to(entry)
    for name in ("pipelines", "rewards", "robotics"):
        (TREE / name).symlink_to(ROOT / name)
    environment = {**os.environ, "MYPYPATH": str(TREE.parent)}
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "setup.cfg"), "-p", "gencontrol"]
    return subprocess.call([*command, "--cache-dir", str(ROOT / ".mypy_cache")], cwd=TREE.parent, env=environment)


if __name__ == "__main__":
    sys.exit(main())
