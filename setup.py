"""Everything is in setup.cfg; this file only refuses a checkout whose links came out as text files."""

from pathlib import Path

from setuptools import setup

for name in ("pipelines", "rewards", "robotics"):
    link = Path(__file__).resolve().parent / "gencontrol" / name
    if not link.is_dir():
        raise SystemExit(
            f"gencontrol: error: {link} should be a link to ../{name} but is not one; run `git config core.symlinks "
            "true && git checkout -- gencontrol` (on Windows: with developer mode on), or install a released wheel."
        )

setup()
