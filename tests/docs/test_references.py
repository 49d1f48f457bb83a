"""What code, tests, examples and pages say about documents is there: files, sections, links."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LISTED = subprocess.run(
    ["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT
).stdout
FILES = [name for name in LISTED.splitlines() if (ROOT / name).is_file() and not (ROOT / name).is_symlink()]
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in FILES
    if name.endswith((".py", ".md", ".toml", ".cfg", ".yml", ".j2", ".html", ".js")) or name == "Makefile"
}
CODE = {name: text for name, text in TEXTS.items() if not name.endswith((".md", ".yml"))}
PAGES = {n: text for n, text in TEXTS.items() if n.endswith(".md") and ("/" not in n or n.startswith("docs/"))}

#: made while the pages are built, from the files at the root
GENERATED = {"docs/changelog.md", "docs/contributing.md"}
#: a document of the repository, with or without a section
CITED = re.compile(r"(?<![\w./-])docs/([\w./-]+\.md)(?:#([\w-]+))?")
#: an experiment of a method's page
EXPERIMENT = re.compile(r"\bE-[A-Z]+-\d\b")
#: names of documents and labels that lived outside the repository
FOREIGN = re.compile(
    r"(?<![\w/#-])(?:methods/)?(?:crd|ctrl|dragon|dts|gpc|design|reliability|robot_interfaces|style|parity|peers)\.md\b"
    r"|\bDRAGON notes\b|(?<![\w/])shared/|/work/"
)


@cache
def anchors(page: str) -> frozenset[str]:
    """The ids of a page: explicit ones, and those that Markdown makes of the headings."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    found = set(re.findall(r'<a id="([\w-]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M):
        explicit = re.search(r"\{#([\w-]+)\}\s*$", heading)
        found.add(explicit[1] if explicit else re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-"))
    return frozenset(found)


def test_cited_documents_and_sections_exist() -> None:
    wrong = []
    for name, text in TEXTS.items():
        for page, section in CITED.findall(text):
            if "NAME" in page or "docs/" + page in GENERATED:
                continue
            target = f"docs/{page}"
            if not (ROOT / target).is_file() or (section and section not in anchors(target)):
                wrong.append(f"{name}: {target}#{section}")
    assert not wrong, "\n".join(wrong)


def test_links_between_pages_resolve() -> None:
    wrong = []
    for name, text in PAGES.items():
        plain = re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.S | re.M)
        for link in re.findall(r"\]\(([^)\s]+)\)", plain):
            if re.match(r"https?://|mailto:", link):
                continue
            path, _, section = link.partition("#")
            target = (ROOT / name).parent.joinpath(path).resolve() if path else ROOT / name
            inside = target.relative_to(ROOT).as_posix()
            if inside in GENERATED or inside.startswith("docs/reference/"):
                continue
            if not target.exists() or (section and target.suffix == ".md" and section not in anchors(inside)):
                wrong.append(f"{name}: {link}")
    assert not wrong, "\n".join(wrong)


def test_no_document_outside_the_repository_is_named() -> None:
    own = Path(__file__).relative_to(ROOT).as_posix()
    wrong = [
        f"{name}:{number}: {line.strip()}"
        for name, text in CODE.items()
        if name != own
        for number, line in enumerate(text.splitlines(), 1)
        for match in FOREIGN.finditer(CITED.sub("", line))
        if match
    ]
    assert not wrong, "\n".join(wrong)


def test_no_numbered_section_of_an_own_document_is_cited() -> None:
    """`§5` is for papers, which the same line or the one before names; our pages have named sections."""
    paper = re.compile(r"arXiv|19\d\d|20\d\d|et al|DiT|PixArt|paper|RFC|BLAKE", re.I)
    wrong = []
    for name, text in CODE.items():
        lines = text.splitlines()
        for number, line in enumerate(lines):
            near = " ".join(lines[max(0, number - 1) : number + 2])
            if "§" in line and not paper.search(near) and name != Path(__file__).relative_to(ROOT).as_posix():
                wrong.append(f"{name}:{number + 1}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("label", ["PAPER", "CODE", "PORT", "FOUND", "DERIVED", "MEASURED", "PILOT"])
def test_labels_are_explained_once(label: str) -> None:
    table = TEXTS["docs/methods/index.md"]
    assert table.count(f"**{label}**") == 1


def test_experiments_that_are_named_have_a_section() -> None:
    known = {label for name, text in PAGES.items() for label in EXPERIMENT.findall(text)}
    named = {label for text in CODE.values() for label in EXPERIMENT.findall(text)}
    assert named and named <= known
