"""What `mkdocs build` does beside Markdown: formulas become MathML, the reference is made from the package, and the
change log and the guide for contributors, which lie at the root of the repository, become pages."""

from __future__ import annotations

import ast
import html
import re
from functools import cache
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]

#: Rooms in the reading order of docs/architecture.md, with the title of their page.
ROOMS = {
    "jobs": "Jobs: the Python face",
    "pipelines": "Pipelines",
    "rewards": "Rewards",
    "algorithms": "Algorithms",
    "sampling": "Sampling",
    "process": "Processes",
    "models": "Models",
    "robotics": "Robots",
    "train": "Training",
    "testing": "Contracts for your own parts",
    "data": "Data",
    "kernels": "Kernels",
    "executors": "Executors",
    "reports": "Reports",
    "ground": "The ground",
}
#: Modules beside the rooms, which all rooms use.
GROUND = ("types", "errors", "config", "registry", "rng", "files", "stats")


def _public(path: Path) -> tuple[list[str], dict[str, str], bool]:
    """What a file defines for the public, what it exports from elsewhere, and whether it has a docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own, origin, exported = [], {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gencontrol"):
            origin |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            own.append(node.name)
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            exported = [e.value for e in getattr(node.value, "elts", []) if isinstance(e, ast.Constant)]
    return own, {name: origin[name] for name in exported if name in origin}, bool(ast.get_docstring(tree))


@cache
def _defined(full: str) -> bool:
    """Whether `gencontrol.module.name` has an entry in the reference."""
    module, _, name = full.rpartition(".")
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path.is_file() and name in _public(path)[0]


def _room(name: str) -> str:
    """The Markdown of one room: its packages and modules in the order of their paths."""
    package = ROOT / "gencontrol"
    if name == "ground":
        paths = [package / f"{module}.py" for module in GROUND]
    else:  # glob does not follow the links `gencontrol/rewards` and so on, hence their targets
        paths = sorted((package / name).resolve().rglob("*.py"), key=lambda p: (p.parent, p.name != "__init__.py", p))
    text = [f"# {ROOMS[name]}\n"]
    base = package if name == "ground" else (package / name).resolve().parent
    for path in paths:
        parts = path.relative_to(base).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(("gencontrol", *(part for part in parts if part != "__init__")))
        own, exported, documented = _public(path)
        if path.name == "__init__.py" and not own and documented:
            text.append(f"::: {module}\n    options:\n      members: false\n")
            if exported:
                links = (f"[`{short}`][{full}]" if _defined(full) else f"`{short}`" for short, full in exported.items())
                text.append(f"From here come {', '.join(links)}.\n")
        elif own:
            text.append(f"::: {module}\n    options:\n      members: [{', '.join(own)}]\n")
    return "\n".join(text)


def on_config(config: Any) -> Any:
    """Put the pages of the reference at the end of the navigation."""
    present = [name for name in ROOMS if name == "ground" or (ROOT / "gencontrol" / name).is_dir()]
    config.nav.append({"Reference": [{ROOMS[name]: f"reference/{name}.md"} for name in present]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no file under docs/."""
    for name in ROOMS:
        if name == "ground" or (ROOT / "gencontrol" / name).is_dir():
            files.append(File.generated(config, f"reference/{name}.md", content=_room(name)))
    for name in ("CHANGELOG", "CONTRIBUTING"):
        text = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Replace each formula that arithmatex has marked by MathML."""

    def formula(match: re.Match[str]) -> str:
        tex = html.unescape(match[2])
        made = convert(tex[2:-2], display="block" if tex.startswith(r"\[") else "inline")
        if "\\" in re.sub("<[^>]*>", "", made):  # the converter shows a command that it does not know as it stands
            raise ValueError(f"a formula has a command that cannot be drawn: {tex}")
        return made

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, content, flags=re.S)
