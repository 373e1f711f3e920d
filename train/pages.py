"""The report of a run of each training script, put together from report.py's parts.

Read after report.py.
"""

from __future__ import annotations

import dataclasses
import html
from pathlib import Path

from miniclip.retrieval import RECALL_AT
from miniclip.weights import atomic_write

from . import report
from .data.pairs import Pairs
from .recall import MATRIX
from .run.loop import Run

SHOWN = 40      # captions, at most, of which samples are drawn on the way
PREDICTED = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "eps - x0"}
WAYS = {"picture to name": "image_to_text", "name to picture": "text_to_image"}


def write_diffusion_report(run: Run, captions: list[str], parameters: int) -> None:
    """report.html and loss.svg of a run of train_diffusion so far."""
    out, cfg, metrics = run.out, run.cfg, run.metrics
    kind = run.state.model.scheduler.prediction_kind
    loss_curve = report.curve({"training loss": report.smooth(metrics.series("loss"))}, "step",
                              f"mean squared error of {PREDICTED[kind]}, smoothed")
    with atomic_write(out / "loss.svg") as file:
        file.write(loss_curve.encode("utf-8"))
    evaluated = [row for row in metrics.rows if "val" in row]
    if not evaluated:                                       # a finished run whose metrics.jsonl was emptied
        return
    last = evaluated[-1]
    drawn = [out / "samples" / f"{step:06d}.png" for step, _ in reversed(metrics.series("val"))]
    grids = [path for path in drawn if path.exists()]       # of this run; others may lie there too
    # drawn by itself
    others = [{k: v for k, v in row.items() if k != "val"} for row in metrics.rows]
    report.write_page(out / "report.html", f"Learning to write: {Path(cfg.data).name}", [
        f"<p>{len(captions)} pictures, {parameters:,} parameters, step {last['step']} of {cfg.steps}, "
        f"{run.speed.seconds():.0f} s.</p>",
        *(report.picture(path, f"Newest samples, {cfg.size} x {cfg.size}, one for each caption: "
                               + "、".join(list(dict.fromkeys(captions))[:SHOWN])) for path in grids[:1]),
        report.notes(metrics.rows), *validation_parts(run, last),
        "<h2>On the way</h2>", *(report.picture(path, f"after {int(path.stem)} steps") for path in grids[1:]),
        *report.curves({"": (others, run.speed.metrics.rows)}),
        "<h2>Settings</h2>", report.table(list(dataclasses.asdict(cfg).items())),
    ])


def validation_parts(run: Run, last: dict) -> list[str]:
    """A curve and a table of the report; a stream and a model for inpainting have no bound."""
    names = {"val": "with captions", "val_free": "without captions",
             "bound": "best possible without captions"}
    names = {name: words for name, words in names.items() if name in last}
    times = [int(name[4:]) for name in last if name.startswith("val_") and name[4:].isdigit()]
    rows = [[t, *(f"{last[f'{name}_{t}']:.4f}" for name in names)] for t in times]
    bound = ("The best possible value is computed exactly from the training pictures; only a captioned model "
             "may go below it. ") if "bound" in names else ""
    lines = {words: run.metrics.series(name) for name, words in names.items()}
    return ["<h2>Validation" + (" beside its bound" if bound else "") + "</h2>",
            report.curve(lines, "step", "mean squared error of x0"),
            f"<p>Fixed pictures, timesteps and noise. {bound}Timestep by timestep, 0 being clean and 999 "
            "noise:</p>", report.table(rows, ["timestep", *names.values()])]


def write_clip_report(run: Run, train: Pairs, test: Pairs, parameters: int) -> None:
    """report.html of a run of train_clip so far. train, test: the pairs that evaluation looks at."""
    out, cfg, metrics = run.out, run.cfg, run.metrics
    evaluated = [row for row in metrics.rows if "image_to_text_R@1" in row]
    if not evaluated:                                       # a finished run whose metrics.jsonl was emptied
        return
    last = evaluated[-1]
    sides = {"": f"{len(train.files)} trained pictures"}
    if test.files:
        sides["held_out_"] = f"{len(test.files)} pictures held out ({cfg.hold_out})"
    wanted = [*(f"R@{k}" for k in RECALL_AT), "chance"]
    rows = [[side, way, *(f"{last[f'{prefix}{key}_{what}']:.3f}" for what in wanted)]
            for prefix, side in sides.items() for way, key in WAYS.items()]
    found = {f"{side}, {way}": metrics.series(f"{prefix}{key}_R@1")
             for prefix, side in sides.items() for way, key in WAYS.items()}
    losses = {"training loss": metrics.series("loss"), "all vectors alike": metrics.series("blind")}
    # drawn above
    others = [{k: v for k, v in row.items() if k != "loss" and "R@" not in k} for row in metrics.rows]
    report.write_page(out / "report.html", f"Pictures and their names: {Path(cfg.data).name}", [
        f"<p>{parameters:,} parameters, step {last['step']} of {cfg.steps}, {run.speed.seconds():.0f} s.</p>",
        report.notes(metrics.rows), report.table(rows, ["", "", "R@1", "R@5", "R@1 by chance"]),
        "<h2>R@1</h2>", report.curve(found, "step", "R@1", log=False),
        "<h2>Loss</h2>", report.curve(losses, "step", "loss above its least value", log=False),
        "<p class='note'>Where all vectors are alike the loss is ln(batch), less what equal captions in a "
        "batch take off: a loss on that line means that nothing is learned, however it got there.</p>",
        *matrices(run, train, test, sides), *report.curves({"": (others, run.speed.metrics.rows)}),
        "<h2>Settings</h2>", report.table(list(dataclasses.asdict(cfg).items())),
    ])


def matrices(run: Run, train: Pairs, test: Pairs, sides: dict[str, str]) -> list[str]:
    """The similarity matrices of this run, as parts of the report."""
    names, parts = "; ".join(list(dict.fromkeys(train.captions[0] + test.captions[0]))[:MATRIX]), []
    for prefix, side in sides.items():
        steps = [step for step, _ in run.metrics.series("image_to_text_R@1")]
        drawn = {step: run.out / "matrix" / f"{prefix}{step:06d}.png" for step in steps}
        pictures = [report.picture(path, f"step {step}") for step, path in drawn.items() if path.exists()]
        parts += [f"<h2>Similarity: {side}</h2><p class='note'>Rows: {html.escape(names)}. Dark where "
                  "alike.</p>",
                  f"<div class='row'>{''.join(pictures)}</div>"]
    return parts
