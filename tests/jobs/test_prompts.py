"""Prompt files: three formats, and every way in which one can be wrong, with its line number."""

from __future__ import annotations

from pathlib import Path

import pytest

from gencontrol.errors import UsageError
from gencontrol.jobs.setup.prompts import bundled_prompts, read_prompts


def _file(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "\ufeffone\r\n\n  two  \n"),
        ("p.jsonl", '{"prompt": "one", "id": 3}\n\n{"prompt": " two"}\n'),
        ("p.csv", 'id,prompt\n1,one\n\n2,"two"\n'),
        ("p.tsv", "caption\tid\none\t1\ntwo\t2\n"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str) -> None:
    assert read_prompts(_file(tmp_path, name, content)) == ["one", "two"]


def test_a_csv_cell_may_hold_commas_and_lines(tmp_path: Path) -> None:
    assert read_prompts(_file(tmp_path, "p.csv", 'prompt\n"a, b\nc"\n')) == ["a, b\nc"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("p.txt", b"good\nalso good\nb\xff\xfed\n", "line 3: not UTF-8"),
        ("p.txt", "", "holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.txt", "ok\nbad\x00one\n", "line 2: control character U\\+0000"),
        ("p.txt", "ok\n" + "x" * 1_000_000, "line 2: 1000000 characters"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2: not JSON"),
        ("p.jsonl", '{"text": "a"}\n', 'line 1: no text under the key "prompt"'),
        ("p.jsonl", '{"prompt": 3}\n', "line 1"),
        ("p.csv", "id,words\n1,a\n", "no column 'prompt'; its columns are: id, words"),
        ("p.csv", "id,prompt\n1,a\n2,\n", "line 3: no prompt"),
        ("p.csv", 'prompt\n"a" b\n', "line 2"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, name: str, content: str | bytes, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        read_prompts(_file(tmp_path, name, content))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="is a folder"):
        read_prompts(tmp_path)


def test_bundled_prompts_of_two_splits_differ() -> None:
    train, test = bundled_prompts("train", 50), bundled_prompts("test", 20)
    assert len(train) == 50 and len(test) == 20
    assert train == bundled_prompts("train", 50)
    assert not set(train) & set(test)
