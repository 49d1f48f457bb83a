"""The pages are built strictly and load nothing from the network; formulas are MathML."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "docs" / "site"))


@pytest.mark.slow
def test_strict_build_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("material", reason='needs pip install "gencontrol[docs]"')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="(https?:)?//', text)
        loaded += re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="https?://', text)
        assert not loaded, page
        assert 'class="arithmatex"' not in text, f"{page} shows raw TeX"
    reference = "".join(p.read_text(encoding="utf-8") for p in pages if "reference" in p.parts)
    for name in (
        "load_reward",
        "TreeSearchPipeline",
        "TextToImagePipeline",
        "evaluate",
        "DiffusionTree",
        "AlgorithmContract",
    ):
        assert re.search(rf'id="gencontrol\.[\w.]*\.{name}"', reference), name


def test_formulas() -> None:
    """MathML, and a command that the converter does not know stops the build instead of being shown."""
    from hooks import on_page_content

    shown = on_page_content(r'<span class="arithmatex">\(\tfrac12 \bar x_t\)</span>')
    assert "<mfrac>" in shown and 'display="inline"' in shown
    assert 'display="block"' in on_page_content(r'<div class="arithmatex">\[\sum_i w_i\]</div>')
    with pytest.raises(ValueError, match="unheard"):
        on_page_content(r'<span class="arithmatex">\(\unheard x\)</span>')
