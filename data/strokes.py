"""Fetches the strokes of more characters, in writing order: files of hanzi-writer, unaltered, with licence.

Read after data/make_calligraphy.py, whose way to fetch it uses. train/data/strokes.py reads what this leaves.
    python -m data.strokes --fetch 500 --out out/strokes-kai         the commonest
    python -m data.strokes --fetch 4 --characters 永和九年 --out DIR
It downloads through npm and, for which characters are the commonest, apt-get; nothing else here does. The
order is that of mainland China: Taiwan, Hong Kong and Japan write some characters otherwise. A few of the
package's orders are wrong; those known to be are left out.
"""

import argparse
from pathlib import Path

from data.make_calligraphy import FREQUENCIES, common_characters, fetch, find, start
from data.make_emoji import archive
from data.packages import PLAIN_NAME, MakerError, members
from miniclip.weights import atomic_write
from train.data.strokes import read_outlined
from train.errors import DataError

PACKAGE = "hanzi-writer-data@2.0.1"
LICENCE = "ARPHICPL.TXT"
WRONG = "翰"                # their order in the package is wrong


def choose(there: set[str], wanted: str) -> list[str]:
    """The wanted characters, each once. Raises MakerError for one that the package lacks or has wrong."""
    if lacking := [char for char in wanted if char not in there]:
        raise MakerError(f"--characters: {PACKAGE} has no {' '.join(lacking)}")
    if wrong := [char for char in wanted if char in WRONG]:
        raise MakerError(f"--characters: the stroke order of {' '.join(wrong)} in {PACKAGE} is wrong")
    return list(dict.fromkeys(wanted))


def commonest(there: set[str], packages: Path) -> list[str]:
    """The package's characters, the commonest of traditional texts first, but for those whose order is wrong.
    """
    fetch("Debian unicode-data 15.0.0-1", [FREQUENCIES], packages)
    ranked = common_characters(find(packages, FREQUENCIES, "Debian unicode-data"))
    return [char for char in ranked if char in there and char not in WRONG]


def write(files: dict[str, bytes], chosen: list[str], out: Path) -> int:
    """Leaves the files of the chosen characters in a folder, each read once to see that it can be; says which
    cannot, and returns how many can."""
    out.mkdir(parents=True, exist_ok=True)
    good = 0
    for char in chosen:
        path = out / f"{char}.json"
        with atomic_write(path) as file:
            file.write(files[path.name])
        try:
            read_outlined(path)
            good += 1
        except DataError as error:
            path.unlink()
            print(f"skipping {error}", flush=True)
    return good


def arguments(argv=None) -> argparse.Namespace:
    """The flags of data.strokes; argv None stands for those of the process."""
    parser = argparse.ArgumentParser("python -m data.strokes", description=__doc__.splitlines()[0])
    parser.add_argument("--fetch", type=int, required=True, metavar="N", help="how many characters at most")
    parser.add_argument("--characters", default="", help="these, not the commonest")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--packages", type=Path, default=Path("out/packages"), help="of npm and Debian")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Writes the files and the licence. Raises MakerError for what cannot work."""
    args = arguments(argv)
    if args.fetch < 1:
        raise MakerError(f"--fetch {args.fetch}: must be at least 1")
    package = archive(args.packages, PACKAGE, download=True)
    files = members(package, lambda name: "/" not in name and name.endswith((".json", LICENCE)))
    if LICENCE not in files:
        raise MakerError(f"{package}: holds no {LICENCE}")
    there = {name.removesuffix(".json") for name in files if PLAIN_NAME.fullmatch(name)}
    wanted = "".join(args.characters.split())
    chosen = choose(there, wanted) if wanted else commonest(there, args.packages)
    good = write(files, chosen[:args.fetch], args.out)
    with atomic_write(args.out / LICENCE) as file:
        file.write(files[LICENCE])
    print(f"{good} characters in {args.out}, beside their licence; the order is that of mainland China")
    return 0


if __name__ == "__main__":
    start(main, ValueError)
