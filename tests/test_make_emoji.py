"""The maker of the emoji set, on small packages made here: what it chooses, what it leaves out,
what it refuses."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from data.make_calligraphy import common_characters
from data.make_emoji import ARTISTS, LANGUAGES, NAMES, main
from data.packages import MakerError, members, read_bz2
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


def tarball(path, *entries):
    """A .tgz of (name, kind, what its header says of its size, bytes)."""
    with gzip.open(path, "wb", compresslevel=9) as file:
        for name, kind, size, content in entries:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            for part in content:
                file.write(part)


@pytest.mark.parametrize("entries", [
    [("package/a.json", tarfile.REGTYPE, 2**40, [b"x" * 512])],                     # it says it is large
    [("x", tarfile.GNUTYPE_LONGNAME, 2**33, [b"x" * 512])],                         # a name of 8 GiB
    [("x", tarfile.XHDTYPE, 2**30, [bytes(2**20)] * 300)],                          # a header that swells
    [("package/a.json", tarfile.REGTYPE, 50, [b"x" * 10])],                         # cut off
    [("package/b", tarfile.REGTYPE, 2**32 - 2**20, [bytes(2**20)] * 8), ("package/a", b"0", 9, [b"x"])],
])
def test_packages_that_swell_or_end_early(tmp_path, entries):
    resource = pytest.importorskip("resource")
    tarball(tmp_path / "a.tgz", *entries)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(MakerError, match="a.tgz: not a package that can be read") as caught:
        members(tmp_path / "a.tgz", lambda name: True)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10            # KiB
    assert time.process_time() - began < 5


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", b"\x1f\x8b\x08" + b"\xff" * 99, b"hello" * 999])
def test_what_is_no_package(tmp_path, content):
    for path, read in ((tmp_path / "a.tgz", lambda path: members(path, lambda name: True)),
                       (tmp_path / "a.bz2", read_bz2), (tmp_path / "b.bz2", common_characters)):
        with pytest.raises(MakerError, match=r"[ab].(tgz|bz2): [^\n]*$"):
            path.write_bytes(content)
            read(path) and pytest.fail("read")
            raise MakerError(f"{path}: an empty table")     # which is one
    (tmp_path / "a.tgz").unlink()
    os.mkfifo(tmp_path / "a.tgz")
    with pytest.raises(MakerError, match="not a regular file"):
        members(tmp_path / "a.tgz", lambda name: True)


@pytest.mark.parametrize("rows", ["U+110000\tkFrequency\t1", "U+99999999999999999999\tkFrequency\t1",
                                  "U+4E00\tkFrequency\tx", "U+4E00\tkFrequency\t1\t2", "x\tkFrequency\t1"])
def test_tables_of_frequencies_that_are_none(tmp_path, rows):
    (tmp_path / "a.bz2").write_bytes(bz2.compress(rows.encode() + b"\n"))
    with pytest.raises(MakerError, match="a.bz2: not Unihan's table of frequencies"):
        common_characters(tmp_path / "a.bz2")
    good = "U+4E00\tkFrequency\t1\n# more\nU+6625\tkFrequency\t3\nU+5764\tkFrequency\t2\n"
    (tmp_path / "a.bz2").write_bytes(bz2.compress(good.encode()))
    assert common_characters(tmp_path / "a.bz2") == ["一", "坤", "春"]
    (tmp_path / "a.bz2").write_bytes(bz2.compress(bytes(65 * 2**20)))
    with pytest.raises(MakerError, match="holds more than 67108864 bytes"):
        common_characters(tmp_path / "a.bz2")


@pytest.mark.parametrize("text", [b"{", b"7", b"[[", b'[{"unified": 3}]', b"[3]", b"\xff", b"[" * 99_999,
                                  b"{}", b'[{"unified": "zz", "image": "a.png"}]', b'[{"unified": "1F600"}]'])
def test_an_index_of_emoji_that_is_none(packages, tmp_path, text):
    package(packages, ARTISTS["google"], {"emoji.json": text})
    flags = ["--out", str(tmp_path / "out"), "--packages", str(packages)]
    if text == b"{}":                       # no emoji: none are written
        assert main(flags) == 0
    else:
        with pytest.raises(MakerError, match="emoji.json") as caught:
            main(flags)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
