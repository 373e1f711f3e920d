"""docs/benchmarks.md, made of docs/benchmarks.json: no number in the page is typed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from miniclip.files import atomic_write, read_json, write_json
from tests.bench.measure import SIDE

INTRO = """# Benchmarks

What `make bench` measured last, and wrote: this page is made of [benchmarks.json](benchmarks.json). Each row
runs ours beside one peer after the other in one process, on the same random weights and inputs, in float32 on
a CPU: a warm-up each, then pairs, turn and turn about. The answers that were timed are compared; a relative
difference above 1e-5 refuses the row (1e-4 for runtimes that are not torch, and for the VAE in channels last,
where torch's GroupNorm is less exact). A row that is behind stays.

    make bench                                                  # all of it, in some hours; or some rows:
    python -m tests.bench unet1 vae --out docs/benchmarks.md    # only these are replaced

- Ours is the model after `minidiff.optimize`, but for `train`, `import`, `load` and `start`. "Tuned" is
  diffusers with channels last and fused projections (no fused ones in `train`), "compiled" is that by
  `torch.compile`, with frozen weights where nothing is trained, timed once it is compiled. It has a line of
  its own and no part in the targets. OpenVINO and ONNX Runtime run what was exported from upstream's model
  with fixed shapes.
- Seconds and ratios are medians. A pair's ratio is peer / ours: 2.00 means that ours took half the time. With
  one thread ratios are of CPU time, which a busy machine changes less; with more threads of wall time.
- The share of the matrix rate is what a run of ours computes by the definitions of its layers, over the rate
  of a product of two {side} x {side} float32 matrices, measured between the pairs. Winograd's convolutions do
  with fewer multiplications than the definition, so the share can pass 100 %.
- Memory is the most that a process of its own holds, Python, torch and mapped files included, which makes the
  engine and runs it once; of an import it is what the import adds; of whole pipelines the run is one step.
"""


class Target(NamedTuple):
    """What a row is to reach: a figure of it, at least or at most `bar`."""

    text: str
    figure: Callable[[dict], float]
    bar: float
    at_least: bool = True
    form: str = "{:.2f}"

    def reached(self, row: dict) -> bool:
        """By the figures of a row."""
        return self.figure(row) >= self.bar if self.at_least else self.figure(row) <= self.bar


def faster(bar: float, *peers: str, say: str | None = None) -> Target:
    """Than the fastest of the peers with names that begin so."""
    return Target(f"{bar:g} x {say or peers[0]}", lambda row: min(ratio(row, p) for p in chosen(row, *peers)),
                  bar)


def smaller(*peers: str) -> Target:
    """In memory, than the smallest of the peers with names that begin so: their memory over ours."""
    return Target(f"less memory than {peers[0]}", lambda row: min(
        p["memory"] / row["ours"]["memory"] for p in chosen(row, *peers)), 1.0)


def chosen(row: dict, *starts: str) -> list[dict]:
    """The peers with names that begin so; compiled ones have ratios of their own in the table."""
    return [p for p in row["peers"] if p["name"].startswith(starts) and "compiled" not in p["name"]]


def clock(row: dict) -> str:
    """Which seconds the table shows: CPU time says nothing of several threads."""
    return "cpu" if row["machine"]["threads"] == 1 else "wall"


def ratio(row: dict, peer: dict) -> float:
    """Peer / ours."""
    return peer[f"{clock(row)}_ratio"]


RATE = Target("75 % of the matrix rate", lambda row: row["share"], 0.75, form="{:.0%}")
UNET = (faster(1.35, "diffusers"), faster(1.0, "OpenVINO"), RATE)
CLIP = (faster(1.2, "", say="the best"),)
TARGETS: dict[str, tuple[Target, ...]] = {
    "unet1": UNET, "unet2": UNET,
    "picture": (faster(1.5, "diffusers"),), "picture256": (faster(1.5, "diffusers"),),
    "train": (faster(1.25, "diffusers"),),
    "demo": (faster(2.0, "ours, not optimized", say="not optimized"),),
    "vae": (faster(1.2, "diffusers"), smaller("diffusers")),
    "clip1": CLIP, "clip32": CLIP,
    "import": (Target("under 50 ms", lambda row: 1000 * row["ours"][clock(row)], 50, False, "{:.0f} ms"),
               Target("under 5 MB", lambda row: 1000 * row["ours"]["memory"], 5, False, "{:.1f} MB")),
    "load": (faster(2.0, "diffusers"), smaller("diffusers")),
    "start": (faster(2.0, "diffusers"), smaller("diffusers")),
}


def read(file: Path) -> dict[str, dict]:
    """Name -> row; none where there is no file yet."""
    return read_json(file) if file.exists() else {}


def store(page: Path, name: str, row: dict) -> None:
    """Replaces a row, in the page and in the .json beside it."""
    data = page.with_suffix(".json")
    rows = {**read(data), name: row}
    write_json(data, rows)
    with atomic_write(page) as file:
        file.write(render(rows).encode())


def render(rows: dict[str, dict]) -> str:
    """The whole page."""
    rows = {name: rows[name] for name in TARGETS if name in rows}
    parts = [INTRO.format(side=SIDE), "## Targets\n", *targets(rows), ""]
    for name, row in rows.items():
        parts += [f"## {name}: {row['title']}\n", *table(name, row), ""]
    return "\n".join([*parts, "## Where and when\n", *places(rows)]) + "\n"


def targets(rows: dict[str, dict]) -> list[str]:
    """A line for each target."""
    lines = ["| row | target | measured | |", "|---|---|---|---|"]
    for name, row in rows.items():
        for target in TARGETS[name]:
            verdict = "reached" if target.reached(row) else "**not reached**"
            lines.append(f"| {name} | {target.text} | {target.form.format(target.figure(row))} | {verdict} |")
    return lines


def table(name: str, row: dict) -> list[str]:
    """A line for each engine of a row."""
    lines = ["| | CPU s | wall s | ratio | difference | memory, GB |", "|---|---|---|---|---|---|"]
    for peer in ({"name": "ours", **row["ours"]}, *row["peers"]):
        ours = peer["name"] == "ours"
        held = f"{peer['memory']:.3f}" if "memory" in peer else ""
        compared = ["", ""] if ours else [f"{ratio(row, peer):.2f}", f"{peer['difference']:.0e}"]
        lines.append("| " + " | ".join([peer["name"], f"{peer['cpu']:.3g}", f"{peer['wall']:.3g}", *compared,
                                        held]) + " |")
    share = (f" {row['flops'] / 1e9:,.0f} GFLOP a run: {row['share']:.0%} of the matrix rate, "
             f"{row['rate'] / 1e9:.0f} GFLOP/s." if "share" in row else "")
    return [*lines, "", f"Pairs: {row['rounds']}.{share}"]


def places(rows: dict[str, dict]) -> list[str]:
    """A line for each machine and set of versions."""
    seen: dict[tuple, list[str]] = {}
    for name, row in rows.items():
        machine = row["machine"]
        threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
        key = f"{machine['cpu']}, {threads}", ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
        seen.setdefault(key, []).append(f"{name} ({row['date']})")
    lines = ["| rows | machine | versions |", "|---|---|---|"]
    return lines + [f"| {', '.join(names)} | {cpu} | {versions} |" for (cpu, versions), names in seen.items()]
