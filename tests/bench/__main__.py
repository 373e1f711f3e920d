"""Ours beside diffusers, transformers, open_clip, OpenVINO and ONNX Runtime: make bench.

    python -m tests.bench                           # all rows, in some hours; or some of them:
    python -m tests.bench unet1 vae --out docs/benchmarks.md

Writes each row, as soon as it is measured, to a page and the .json beside it; docs/benchmarks.md says how it
measures. A row whose answers disagree, or that fails, is not written; the others are. Linux: memory is read
from /proc.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

import torch

from tests.bench import measure
from tests.bench.engines import OURS, child, export, peak_of
from tests.bench.fresh import Import, Load
from tests.bench.models import Clip, Decoder, Unet
from tests.bench.page import TARGETS, store
from tests.bench.whole import Demo, Picture, Train

ROWS = {"unet1": partial(Unet, batch=1), "unet2": partial(Unet, batch=2),
        "picture": partial(Picture, size=512), "picture256": partial(Picture, size=256),
        "train": Train, "demo": Demo, "vae": Decoder, "clip1": partial(Clip, batch=1),
        "clip32": partial(Clip, batch=32), "import": Import, "load": Load,
        "start": partial(Load, imports=True)}
assert ROWS.keys() == TARGETS.keys()
PACKAGES = {"torch": "torch", "diffusers": "diffusers", "transformers": "transformers",
            "open_clip_torch": "open_clip", "openvino": "openvino", "onnxruntime": "onnxruntime",
            "onnx": "onnx", "onnxscript": "onnxscript", "safetensors": "safetensors"}


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if args.export or args.peak:
        return one_engine(args)
    missing = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"not installed: {', '.join(missing)} (make bench installs the extra 'bench'; onnxruntime "
              "needs Python 3.11)", file=sys.stderr)
        return 1
    os.environ["TQDM_DISABLE"] = "1"                    # progress bars between the lines
    failed = []
    for name in args.rows or ROWS:
        try:
            with tempfile.TemporaryDirectory(dir=args.folder, prefix="bench-") as folder:
                store(args.out, name, run(name, args, Path(folder)))
        except Exception as error:                      # of any of six libraries; the next row does not mind
            if args.traceback:
                traceback.print_exc()
            line = (str(error).strip() or "-").splitlines()[0][:200]
            print(f"{name}: {type(error).__name__}: {line}", file=sys.stderr)
            failed.append(name)
    if failed:
        print(f"no row of {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0, help="pairs; by default each row's own number")
    parser.add_argument("--steps", type=int, default=0, help="of picture and demo; by default 20 and 30")
    parser.add_argument("--only", nargs="*", help="peers with names that begin so")
    parser.add_argument("--folder", type=Path,
                        help="where 8 GB may be written for a while; by default TMPDIR")
    parser.add_argument("--traceback", action="store_true", help="where a row fails, all of it")
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def one_engine(args: argparse.Namespace) -> int:
    """In a process of its own: export a model, or tell how much memory an engine takes."""
    row = ROWS[args.rows[0]](args.rows[0], args.folder, bool(args.peak), args.steps)
    print(peak_of(row, args.peak) if args.peak else export(row, args.export))
    return 0


def run(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """Measures a row: ours beside one peer after the other, so that no more than two are in memory."""
    row = ROWS[name](name, folder, False, args.steps)
    print(f"{name}: {row.title}", flush=True)
    peers = [engine for engine in row.engines[1:] if engine.startswith(tuple(args.only or [""]))]
    for peer in peers:
        row.prepare(peer)
    ours, compared, held = row.build(OURS), {}, {}
    for peer in peers:
        limit = measure.LOOSE if peer in row.loose else measure.EXACT
        theirs = row.build(peer)
        compared[peer] = measure.alternate(ours, theirs, args.rounds or row.rounds, limit, row.warm)
        del theirs
        torch._dynamo.reset()                           # it keeps what it compiled
        gc.collect()
        print_pair(peer, compared[peer])
    found = measure.row(compared, row.flops)
    del ours
    if row.peaks:
        row.kept = None
        held = {engine: float(child(row, "--peak", engine)) for engine in (OURS, *compared)
                if "compiled" not in engine}            # the compiler would be measured
        print(f"    GB: {', '.join(f'{engine} {gb:.2f}' for engine, gb in held.items())}", flush=True)
    for engine, gb in held.items():
        next((p for p in found["peers"] if p["name"] == engine), found["ours"])["memory"] = gb
    return {"title": row.title, **found, "date": datetime.date.today().isoformat(), "machine": machine()}


def machine() -> dict:
    """What the seconds depend on."""
    return {"cpu": cpu(), "threads": torch.get_num_threads(),
            "versions": {"Python": platform.python_version(),
                         **{name: importlib.metadata.version(name) for name in PACKAGES}}}


def cpu() -> str:
    """Its model, and which instructions torch uses."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")),
                 platform.processor())
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def print_pair(peer: str, compared: measure.Compared) -> None:
    """One line, of what is known so far."""
    found = measure.row({peer: compared}, None)
    theirs, = found["peers"]
    print(f"    {peer:28} ours {found['ours']['cpu']:8.3f} s CPU, {found['ours']['wall']:8.3f} s; theirs "
          f"{theirs['cpu']:8.3f}, {theirs['wall']:8.3f}; ratio {theirs['cpu_ratio']:5.2f}, "
          f"{theirs['wall_ratio']:5.2f}; difference {theirs['difference']:.0e}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
