"""The run folder: made, proven writable, never written over unasked, and cleared by name.

Read before checkpoint.py.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from miniclip.weights import atomic_write

from ..errors import UserError
from .distributed import Ranks
from .settings import TrainSettings

MARKS = ("checkpoint*.pt", "best.pt", "model", "metrics.jsonl")     # any of these makes a folder a run folder
OF_A_RUN = re.compile(r"""
    checkpoint(\.\d+|\.new)?\.pt | best\.pt | config\.json | (metrics|speed)\.jsonl | report\.html | loss\.svg
    | skipped(\.\d+)?\.txt | evaluation\.(json|html) | evaluation_(legible|seeds)\.png
    | evaluation-skipped\.txt | (answers|hits|upscaler|distilled)\.png | gallery\.html
    | gallery/\w+/[^/]+\.(png|gif|json) | (samples|matrix)/(held_out_)?\d{6,}\.png
    | index[^/]*/(index\.json|embeddings\.safetensors)
    | lora/(pytorch_lora_weights\.safetensors|adapter_model\.safetensors|adapter_config\.json)
    | model/(\w+/)?((diffusion_pytorch_)?model[\w.-]*\.safetensors(\.index\.json)?|(merges|vocab)\.txt
                    |(\w*config|model_index|writer|matcher)\.json
                    |(vocab|tokenizer|added_tokens|special_tokens_map)\.json)
    """, re.VERBOSE)    # all that a run and who asks it leave there, but caches under checksums


def make_folder(path: str | Path, write: bool = True) -> Path:
    """Creates an output folder, proves that it can be written,
    and removes what a killed run left half written."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if write:
        with atomic_write(path / "writable"):
            pass
        (path / "writable").unlink()
        for left in path.rglob(".*.tmp"):
            if re.fullmatch(r"\..*\.[0-9a-f]{12}\.tmp", left.name):      # the temporary names of atomic_write
                left.unlink(missing_ok=True)
    return path


def claim(cfg: TrainSettings, ranks: Ranks) -> Path:
    """The run folder, made if need be. Neither a run in it nor what --init reads is ever lost unasked."""
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume, --overwrite: give one of them, to go on with a run or to begin it anew")
    out = make_folder(cfg.out, write=ranks.main)
    marks = [path for mark in MARKS for path in out.glob(mark)]
    found = ranks.union([path.name for path in marks if ranks.main])    # what the first process sees counts
    if found and not (cfg.resume or cfg.overwrite):
        raise UserError(f"--out {out}: holds a run already ({found[0]}); --resume goes on with it, "
                        "--overwrite removes it and begins anew, another --out leaves it as it is")
    if cfg.overwrite and cfg.init and Path(cfg.init).resolve().is_relative_to(out.resolve()):
        raise UserError(f"--init {cfg.init}: lies in --out {out}, and --overwrite removes it; give another")
    return out


def clear(out: Path, within: str = "") -> None:
    """Removes what an earlier run left, by name: other files stay, and so do folders that hold some.
    within: only what lies in this folder of the run's."""
    names = {path: path.relative_to(out).as_posix() for path in (out / within).rglob("*")
             if not path.is_dir()}
    found = [path for path, name in names.items() if OF_A_RUN.fullmatch(name)]
    for path in sorted(found, key=lambda path: path.parent == out):     # last what tells that a run is here
        path.unlink()
    folders = {folder for path in found for folder in path.relative_to(out).parents if folder.parts}
    for folder in sorted(folders, reverse=True):
        with contextlib.suppress(OSError):
            (out / folder).rmdir()
