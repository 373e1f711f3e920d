"""The maker of the emoji set, on small packages made here: what it chooses, what it leaves out,
what it refuses."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from data.make_calligraphy import MakerError
from data.make_emoji import ARTISTS, LANGUAGES, NAMES, main
from train.data.table import list_captioned

EMOJI = {"1F33F": ("herb", "草藥", "药草"), "1F9C4": ("garlic", "大蒜", "蒜"),
         "1F9C5": ("onion", "洋蔥", "洋葱"),
         "1F336-FE0F": ("hot pepper", "辣椒", "红辣椒"), "1F345": ("garlic", "番茄", "西红柿")}


def package(folder: Path, name: str, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / f"{name.replace('@', '-')}.tgz", "w:gz") as archive:
        for inner, data in files.items():
            member = tarfile.TarInfo(f"package/{inner}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    index = [{"unified": code, "image": f"{code.lower()}.png", "has_img_google": True,
              "has_img_twitter": code != "1F9C5"}
             for code in EMOJI]
    for artist, name in ARTISTS.items():
        drawings = {f"img/{artist}/64/{e['image']}": f"{artist} {e['image']}".encode() for e in index}
        package(tmp_path, name, {"emoji.json": json.dumps(index).encode(), **drawings,
                                 "../escape.png": b"no"})
    tables = {}
    for column, language in (("en", "en"), ("zh-Hant", "zh-Hant"), ("zh-Hans", "zh")):
        place = {"en": 0, "zh-Hant": 1, "zh-Hans": 2}[column]
        entries = {"".join(chr(int(c, 16)) for c in code.split("-") if c != "FE0F"): {"tts": [names[place]]}
                   for code, names in EMOJI.items()}
        tables[f"annotations/{language}/annotations.json"] = json.dumps(
            {"annotations": {"annotations": entries}}, ensure_ascii=False).encode()
    package(tmp_path, NAMES, tables)
    return tmp_path


def test_two_drawings_of_each_thing_with_a_name_of_its_own(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert main(["--out", str(out), "--packages", str(packages)]) == 0
    assert sorted(p.name for p in out.glob("*.png")) == [
        f"{artist}_{code}.png" for artist in ("google", "twitter")
        for code in ("1f336-fe0f", "1f33f", "1f9c4")]
    assert (out / "twitter_1f33f.png").read_bytes() == b"twitter 1f33f.png"
    names = {column: [p.caption for p in list_captioned(out, column)] for column in (*LANGUAGES, "artist")}
    # no onion: one artist; no second garlic
    assert names["zh-Hant"] == ["草藥", "草藥", "大蒜", "大蒜", "辣椒", "辣椒"]
    assert names["artist"] == ["google", "twitter"] * 3
    assert not list(tmp_path.rglob("escape.png"))


def test_missing_and_broken_packages_are_named(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(MakerError, match="emoji-datasource-google@16.0.0.*--fetch"):
        main(["--out", str(tmp_path / "x"), "--packages", str(tmp_path / "nowhere")])
    path = packages / f"{NAMES.replace('@', '-')}.tgz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(MakerError, match="cldr-annotations-full"):
        main(["--out", str(tmp_path / "x"), "--packages", str(packages)])
    package(packages, NAMES, {"annotations/en/annotations.json": b"not json",
                              "annotations/zh/annotations.json": b"{}"})
    with pytest.raises(MakerError, match="zh-Hant"):
        main(["--out", str(tmp_path / "x"), "--packages", str(packages)])
