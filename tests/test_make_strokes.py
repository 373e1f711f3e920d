"""The maker of stroke files, on a small package made here, and the tool that registers: what they leave."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import register
from data.make_calligraphy import MakerError
from data.strokes import PACKAGE, main
from train.data.strokes import Character, read_character
from train.registration import Fit

STROKES = Path(__file__).parent.parent / "data" / "strokes"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    files = {f"{char}.json": (STROKES / f"{char}.json").read_bytes() for char in "春坤"}
    files |= {"翰.json": files["春.json"], "壞.json": b'{"strokes": ["M 0 0 Z"], "medians": []}',
              "ARPHICPL.TXT": b"terms", "../escape.json": b"{}", "APL/ARPHICPL.TXT": b"other"}
    with tarfile.open(tmp_path / f"{PACKAGE.replace('@', '-')}.tgz", "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    return tmp_path


def fetch(packages: Path, out: Path, characters: str, count: int = 9) -> int:
    return main(["--fetch", str(count), "--characters", characters, "--packages", str(packages), "--out",
                 str(out)])


def test_files_come_unaltered_beside_their_licence(packages: Path, tmp_path: Path, capsys) -> None:
    assert fetch(packages, tmp_path / "out", "坤春壞") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"春.json", "坤.json", "ARPHICPL.TXT"}
    assert (tmp_path / "out" / "春.json").read_bytes() == (STROKES / "春.json").read_bytes()
    assert (tmp_path / "out" / "ARPHICPL.TXT").read_bytes() == b"terms"
    said = capsys.readouterr().out
    assert "skipping" in said and "壞.json" in said and "order is that of mainland China" in said


def test_at_most_as_many_as_asked_for(packages: Path, tmp_path: Path) -> None:
    fetch(packages, tmp_path / "out", "坤春", count=1)
    assert [p.name for p in (tmp_path / "out").glob("*.json")] == ["坤.json"]


@pytest.mark.parametrize("characters, words", [("春龘", "has no 龘"), ("翰", "order of 翰 .* is wrong")])
def test_what_cannot_be_had_is_one_line(packages: Path, tmp_path: Path, characters: str, words: str) -> None:
    with pytest.raises(MakerError, match=words):
        fetch(packages, tmp_path / "out", characters)


def test_the_tool_keeps_what_passes_and_names_the_rest(tmp_path: Path, monkeypatch, capsys) -> None:
    def fit(ink: np.ndarray, printed: Character) -> Fit:
        ones = [1.0] * len(printed.strokes)
        return Fit(printed.strokes, 0.9 if ink[0, 0] else 0.2, ones, ones, [0.0] * 8, [0.0] * 8, 0.0)

    monkeypatch.setattr(register, "fit", fit)
    for name, corner in (("a.png", 0), ("b.png", 255)):
        picture = np.zeros((64, 64), np.uint8)
        picture[0, 0] = corner
        Image.fromarray(picture).save(tmp_path / name)
    rows = ["file,character,hand", "a.png,坤,楷書", "b.png,坤,行書", "b.png,坤,草書"]
    (tmp_path / "captions.csv").write_text("\n".join(rows), encoding="utf-8")
    register.main(["--pictures", str(tmp_path), "--out", str(tmp_path / "out"), "--look",
                   str(tmp_path / "look"), "--date", "2000-01-02"])
    (path,) = (tmp_path / "out").rglob("*.json")
    character = read_character(path)
    assert (character.char, character.hand, len(character.strokes)) == ("坤", "楷書", 8)
    assert "Changed on 2000-01-02" in json.loads(path.read_text("utf-8"))["notice"]
    assert {p.name for p in (tmp_path / "look").iterdir()} == {"坤_楷書.png", "坤_行書.png"}
    said = capsys.readouterr().out
    assert "left out, as its strokes are joined: 草書" in said and "1 of 2 passed" in said
    assert "坤 行書  overlap 0.200" in said and "less than 0.8" in said


def test_no_table_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MakerError, match="captions.csv: cannot be read"):
        register.main(["--pictures", str(tmp_path), "--out", str(tmp_path / "out")])
