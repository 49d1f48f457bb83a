"""The import rule of docs/architecture.md#import-rule, read from the source of every file, and what `import gencontrol`
costs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gencontrol"

#: the ground: imported by all, imports nothing of ours
GROUND = {"types", "errors", "files", "stats", "rng", "config", "registry", "weights", "_compat", "_version"}
BELOW = {*GROUND, "process", "kernels", "models", "data"}
METHODS = {*BELOW, "sampling", "rewards", "algorithms"}
#: a table of names and traits, which loads nothing
NAMES = {"sampling.samplers"}
#: room → rooms that it may import at the top of a file
TOP = {
    **dict.fromkeys(GROUND, GROUND),
    "process": {*GROUND, "process", "kernels"},
    "kernels": {*GROUND, "process", "kernels"},
    "models": BELOW,
    "data": BELOW,
    "sampling": {*BELOW, "sampling", "rewards.base", "rewards.loading"},
    "rewards": {*GROUND, "rewards"},
    "algorithms": METHODS,
    "train": {*GROUND, "train", "algorithms.base"},
    "reports": {*GROUND, *NAMES, "reports"},
    "pipelines": {*BELOW, "sampling", "algorithms.online.task", "robotics", "pipelines"},
    "robotics": {*METHODS, "robotics"},
    "recipes": {*METHODS, "recipes", "jobs.setup", "reports", "bench.base", "pipelines"},
    "jobs": {
        *GROUND,
        *NAMES,
        "jobs",
        "recipes",
        "train.config",
        "robotics.evaluation.settings",
        "robotics.policies.config",
    },
    "cli": {*GROUND, "cli"},
    "testing": {*METHODS, "train", "testing"},
    "bench": {*METHODS, "robotics", "pipelines", "train", "recipes", "reports.charts", "bench"},
    "__main__": {"cli"},
}
#: and, inside functions or for types only, these too
LAZY = {
    "rewards": {"data", "models", "recipes"},
    "models": {"sampling"},
    "recipes": {"jobs", "pipelines", "train", "bench"},
    "jobs": {*METHODS, "robotics", "train", "pipelines", "reports", "recipes", "bench"},
    "cli": {"jobs"},
}
#: libraries that no file may import at its top
HEAVY = {"diffusers", "transformers", "peft", "gymnasium", "mujoco", "soundfile", "tensorboard", "rich", "typer"}
MAY = {"cli": {"typer"}}


@dataclass(frozen=True)
class Import:
    """One import statement: who, what, and whether it runs when the file is imported."""

    file: Path
    part: str
    name: str
    top: bool

    def __str__(self) -> str:
        where = "at the top" if self.top else "in a function"
        return f"{self.file.relative_to(ROOT)} imports {self.name} {where}"


def _files() -> Iterator[tuple[str, Path]]:
    for folder, _, names in sorted(os.walk(PACKAGE, followlinks=True)):
        for file in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
            yield ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), file


def _top_level(tree: ast.Module) -> set[ast.AST]:
    """Statements that run at import: everything outside functions and `if TYPE_CHECKING`."""
    found: set[ast.AST] = set()
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack.extend(node.orelse)
            continue
        found.add(node)
        stack.extend(ast.iter_child_nodes(node))
    return found


def _imports() -> list[Import]:
    rows = []
    for dotted, file in _files():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        top = _top_level(tree)
        part = dotted.split(".")[1] if "." in dotted else "__init__"
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import; write the full name"
                module = node.module or ""
                names = [f"{module}.{a.name}" for a in node.names] if module == "gencontrol" else [module]
            rows += [Import(file, part, name, node in top) for name in names]
    return rows


IMPORTS = _imports()


def test_the_reader_sees_imports() -> None:
    """Guards the tests below against reading nothing."""
    assert len(IMPORTS) > 300
    assert any(i.top and i.name == "torch" for i in IMPORTS)
    assert any(not i.top and i.name == "transformers" for i in IMPORTS)


def test_no_bare_names_of_our_folders() -> None:
    """`import rewards` would make a second copy of every module in it."""
    bare = {"rewards", "pipelines", "robotics"}
    assert [str(i) for i in IMPORTS if i.name.split(".")[0] in bare] == []


def test_layers() -> None:
    wrong = []
    for i in IMPORTS:
        if i.part == "__init__" or not i.name.startswith("gencontrol."):
            continue
        target = i.name.removeprefix("gencontrol.")
        allowed = TOP[i.part] | (set() if i.top else LAZY.get(i.part, set()))
        if not any(target == name or target.startswith(f"{name}.") for name in allowed):
            wrong.append(str(i))
    assert wrong == []


def test_no_circles() -> None:
    """Not one, imports inside functions and for types included: a lazy import is for start-up time, not for knots."""
    modules = {dotted for dotted, _ in _files()}
    graph: dict[str, set[str]] = {}
    for dotted, file in _files():
        found = graph[dotted] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & modules) or {str(node.module)}
        found &= modules - {dotted}
    # what is left after removing, again and again, whatever imports nothing that is left
    while done := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in done}
    reached = {name for targets in graph.values() for name in targets}
    assert sorted(name for name in graph if name in reached) == []


def test_pipelines_and_rewards_never_import_train() -> None:
    assert [
        str(i) for i in IMPORTS if i.part in ("pipelines", "rewards", "robotics") and "gencontrol.train" in i.name
    ] == []


def test_heavy_libraries_are_imported_in_functions() -> None:
    wrong = [
        str(i)
        for i in IMPORTS
        if i.top and (root := i.name.split(".")[0]) in HEAVY and root not in MAY.get(i.part, set())
    ]
    assert wrong == []


def test_no_unpickling() -> None:
    """torch.load, pickle and friends run a stranger's code; torch.load(…, weights_only=True) builds tensors alone."""
    wrong = [str(i) for i in IMPORTS if i.name.split(".")[0] in ("pickle", "cloudpickle", "dill", "shelve", "marshal")]
    for _, file in _files():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec"):
                if "weights_only=True" in [ast.unparse(keyword) for keyword in node.keywords]:
                    continue
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno} calls {ast.unparse(node.func)}")
    assert wrong == []


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    return done.stdout.strip()


def test_import_is_light() -> None:
    """Nothing heavy, and under a second after torch (CPU seconds, so that a busy machine does not matter)."""
    code = (
        "import sys, time, torch; begin = time.process_time(); import gencontrol; "
        "print(time.process_time() - begin, *[m for m in "
        f"{sorted(HEAVY | {'scipy', 'accelerate'})} if m in sys.modules])"
    )
    seconds, *loaded = _python(code).split()
    assert loaded == []
    assert float(seconds) < 1.0


def test_the_command_line_needs_no_torch_for_help() -> None:
    code = (
        "import sys, time; begin = time.process_time(); from gencontrol.cli import main; code = main(['--help']); "
        "print('seconds', time.process_time() - begin, code, "
        "*[m for m in ('torch', 'numpy', 'diffusers') if m in sys.modules])"
    )
    words = _python(code).splitlines()[-1].split()
    assert words[0] == "seconds" and words[2:] == ["0"]
    assert float(words[1]) < 1.5


def test_every_folder_is_a_package_with_a_docstring() -> None:
    folders = {file.parent for _, file in _files()}
    assert len(folders) > 40
    for folder in folders:
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), folder
