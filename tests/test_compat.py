"""The torchvision guard: acts only for torchvision, defines the operators only where the compiled part is broken."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path


def run(code: str, path: Path) -> str:
    """Run code in a fresh interpreter that finds `path` first; returns what it printed."""
    script = f"import sys; sys.path.insert(0, {str(path)!r})\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


def test_broken_torchvision_gets_its_operators(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "_C.so").write_bytes(b"not a library")
    # what torchvision's Python part does at import: it names operators that its compiled part should have defined
    (package / "__init__.py").write_text("import torch\nfound = torch.ops.torchvision.nms\n")
    broken = """
        try:
            import torchvision
        except Exception as error:
            print(type(error).__name__)
        """
    assert run(broken, tmp_path).strip() == "AttributeError"
    fixed = """
        import gencontrol, torchvision
        print(torchvision.found)
        print(sum(type(finder).__name__ == "_TorchvisionGuard" for finder in sys.meta_path))
        """
    printed = run(fixed, tmp_path).splitlines()
    assert "nms" in printed[0] and printed[1] == "0"


def test_importing_gencontrol_does_not_load_torch() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", "import sys, gencontrol; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert printed.stdout.strip() == "False"
