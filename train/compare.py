"""Runs side by side: python -m train.compare out/a out/b --out out/compare.html

Read after report.py. Reads config.json, metrics.jsonl and speed.jsonl of run folders of either script.
"""

from __future__ import annotations

import argparse
import html
from pathlib import Path

from . import report
from .errors import UserError
from .run.cli import read_settings, start
from .run.log import read_rows


def main(folders: list[str], out: str) -> None:
    """Leaves the page at `out`, and prints what is wrong with each run.

    Raises UserError where a folder holds no run, and WeightsError for files of one that are damaged.
    """
    names = dict(zip(folders, short_names(folders), strict=True))
    runs = {names[folder]: (rows_of(folder, "metrics.jsonl"), rows_of(folder, "speed.jsonl"))
            for folder in folders}
    configs = [read_settings(Path(folder)) for folder in folders]
    flags = [key for key in dict.fromkeys(key for config in configs for key in config) if key != "out"]
    differing = [[key, *(config.get(key, "") for config in configs)] for key in flags
                 if len({str(config.get(key)) for config in configs}) > 1]
    parts = ["<h2>Where their settings differ</h2>", report.table(differing, ["", *runs])]
    for name, (rows, _) in runs.items():
        for line in report.diagnose(rows):
            print(f"{name}: {line}")
            parts.append(f'<p class="warning">{html.escape(name)}: {html.escape(line)}</p>')
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    report.write_page(Path(out), " and ".join(runs), [*parts, *report.curves(runs)])
    print(f"open {out}")


def short_names(folders: list[str]) -> list[str]:
    """The last part of each path, or all of it where two end alike."""
    ends = [Path(folder).name for folder in folders]
    return ends if len(set(ends)) == len(ends) else folders


def rows_of(folder: str, name: str) -> report.Rows:
    """The rows of a run folder's .jsonl file. Raises UserError where it is missing."""
    if not (Path(folder) / name).exists():
        raise UserError(f"{folder}: no run folder (it would hold {name})")
    return read_rows(Path(folder) / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m train.compare",
                                     description="Runs side by side on one page, and what is wrong with each "
                                                 "in words.")
    parser.add_argument("folders", nargs="+", help="run folders of train.train_diffusion or train.train_clip")
    parser.add_argument("--out", default="out/compare.html", help="page to write (%(default)s)")
    start(lambda: main(**vars(parser.parse_args())))
