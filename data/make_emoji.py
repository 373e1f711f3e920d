"""Makes a benchmark of about 1585 pictures by two artists each, with names in three languages: emoji.

Read after: data/make_calligraphy.py, whose way to fetch it uses. Read before: train/train_clip.py.
    python -m data.make_emoji --out out/emoji --packages out/packages --fetch
Only --fetch touches the network, through npm. The same thing drawn by two artists makes an honest test: train
on one (`--hold-out artist=twitter`), ask about the other.
Nothing of it is committed; data/LICENSES.md names the terms.
"""

import argparse
import csv
from pathlib import Path, PurePosixPath

from data.make_calligraphy import run_client, start
from data.packages import PLAIN_NAME, MakerError, json_of, members

ARTISTS = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
NAMES = "cldr-annotations-full@48.2.0"
LANGUAGES = {"zh-Hant": "zh-Hant", "zh-Hans": "zh", "en": "en"}     # column -> CLDR's name of it
VARIATION = "\ufe0f"            # "draw this as an emoji": in the pictures' names, not in CLDR's


def archive(folder: Path, package: str, download: bool) -> Path:
    """The package's .tgz in `folder`; fetched if asked for, else MakerError says how to get it."""
    name, _, version = package.rpartition("@")
    path = folder / f"{name}-{version}.tgz"
    if not path.is_file() and download:
        print(f"fetching {package}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        run_client(["npm", "pack", "--silent", package], folder, package)   # a tarball: no scripts run
    if not path.is_file():
        raise MakerError(f"{path}: no such file; it is npm's {package}: add --fetch, or put it there")
    return path


def read_names(path: Path) -> list[dict[str, str]]:
    """For each language, emoji -> its name."""
    inner = [f"annotations/{language}/annotations.json" for language in LANGUAGES.values()]
    files = members(path, lambda name: name in inner)
    try:
        tables = [json_of(files, name, path)["annotations"]["annotations"] for name in inner]
        return [{emoji: str(entry["tts"][0]) for emoji, entry in table.items() if "tts" in entry}
                for table in tables]
    except (AttributeError, LookupError, TypeError):
        raise MakerError(f"{path}: not CLDR's annotations") from None


def choose(emoji: list[dict], tables: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """File name and names of each emoji that both artists drew and that has a name of its own in each
    language."""
    chosen, taken = [], [set() for _ in tables]
    for entry in emoji:
        sign = "".join(chr(int(code, 16)) for code in entry["unified"].split("-")).replace(VARIATION, "")
        names = [table.get(sign) for table in tables]
        drawn = PLAIN_NAME.fullmatch(entry["image"]) and all(entry.get(f"has_img_{a}") for a in ARTISTS)
        if drawn and all(names) and not any(name in used for name, used in zip(names, taken, strict=True)):
            chosen.append((entry["image"], names))
            for name, used in zip(names, taken, strict=True):
                used.add(name)
    return chosen


def write(out: Path, chosen: list[tuple[str, list[str]]], packages: dict[str, Path]) -> int:
    """Writes out/ARTIST_CODE.png and out/captions.csv; returns how many pictures."""
    out.mkdir(parents=True, exist_ok=True)
    drawings = {}
    for artist, path in packages.items():
        wanted = {f"img/{artist}/64/{image}" for image, _ in chosen}
        drawings[artist] = {PurePosixPath(k).name: v for k, v in members(path, wanted.__contains__).items()}
    rows = [[f"{artist}_{image}", *names, artist] for image, names in chosen for artist in ARTISTS
            if all(image in drawn for drawn in drawings.values())]
    for file, *_, artist in rows:
        (out / file).write_bytes(drawings[artist][file.removeprefix(f"{artist}_")])
    with open(out / "captions.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["file", *LANGUAGES, "artist"], *rows])
    return len(rows)


def main(argv=None) -> int:
    """Writes both artists' pictures and captions.csv. Returns the exit status.

    Raises MakerError for a package that is missing or cannot be read.
    """
    parser = argparse.ArgumentParser("python -m data.make_emoji", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/emoji"),
                        help="folder to write (default: %(default)s)")
    parser.add_argument("--packages", type=Path, default=Path("out/packages"),
                        help="folder with the npm packages")
    parser.add_argument("--fetch", action="store_true",
                        help="download the packages that are missing (about 150 MB)")
    args = parser.parse_args(argv)
    packages = {artist: archive(args.packages, package, args.fetch) for artist, package in ARTISTS.items()}
    tables = read_names(archive(args.packages, NAMES, args.fetch))
    index = members(packages["google"], lambda name: name == "emoji.json")
    try:
        chosen = choose(json_of(index, "emoji.json", packages["google"]), tables)
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError) as error:
        raise error if isinstance(error, MakerError) else MakerError(
            f"{packages['google']}: emoji.json is not a list of emoji") from None
    print(f"{write(args.out, chosen, packages)} pictures of {len(chosen)} things in {args.out}")
    return 0


if __name__ == "__main__":
    start(main)
