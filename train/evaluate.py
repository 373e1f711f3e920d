"""What a trained run can do, in figures: python -m train.evaluate --run out/calligraphy [--judge out/judge]

Read after sample.py. Prints, and writes to RUN/evaluation.html:
legible    share of samples that an independent judge (train/judge.py) names right: the character alone, with
           each hand, and at several strengths of guidance
memory     distance of each sample to its nearest training image AFTER affine alignment, beside the distances
           between the training pictures and those of jittered copies: plain pixel distance cannot tell a
           shifted copy from a new picture
control    how far seed, prompt and guidance move the picture, each changed alone
Shapes: N samples, M training pictures, [N, 1, S, S] in [-1, 1].
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.weights import write_json
from minidiff.optimize import optimize
from minidiff.text_to_image import TextToImage

from . import report
from .data.augment import jitter
from .data.folder import CaptionedImages
from .data.grid import grid_columns, save_grid
from .errors import UserError
from .run.cli import (
    MAX_SEED,
    check_flags,
    flag,
    model_folder,
    parse_flags,
    pick_device,
    read_settings,
    start,
)
from .run.log import Progress


@dataclass(frozen=True)
class EvaluateConfig:
    """The flags of train.evaluate."""

    run: str = flag("out/calligraphy", "run folder of train.train_diffusion")
    data: str = flag("", "training pictures; empty: those that the run names")
    judge: str = flag("", "a judge's folder (train.judge); empty: no legibility")
    count: int = flag(20, "samples of each character", at_least=1, at_most=10_000)
    steps: int = flag(20, "denoising steps", at_least=1, at_most=1000)
    guidance: float = flag(1.5, "guidance, where it is not what is varied", at_least=-1000, at_most=1000)
    seed: int = flag(7, "seed of the samples", at_least=0, at_most=MAX_SEED - 10_000)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: EvaluateConfig) -> None:
    """Measures a run; leaves evaluation.json, evaluation.html and its pictures in the run folder.

    Raises UserError, DataError for the training pictures, WeightsError and ConfigError for the run.
    """
    check_flags(cfg)
    folder = Path(cfg.run)
    model = optimize(TextToImage.load(model_folder(cfg.run))).to(pick_device(cfg.device))
    settings = read_settings(folder, data=str, caption_column=str)
    data = CaptionedImages(cfg.data or settings["data"], size=model.drawn_size,
                           channels=model.format.channels, caption_column=settings["caption_column"])
    parts, results = [], {}
    for measure in (legible, memory, control):
        measured, pieces = measure(model, data, cfg, folder)
        results |= measured
        parts += pieces
    write_json(folder / "evaluation.json", results)
    report.write_page(folder / "evaluation.html", "What the run can do", parts)
    print(f"open {folder / 'evaluation.html'}")


def draw(model: TextToImage, prompts: list[str], cfg: EvaluateConfig, progress: Callable[[int], None],
         guidance: float | None = None, seed: int = 0) -> Tensor:
    """One picture for each prompt, [N, C, S, S]. guidance: else that of cfg; seed: on top of that of cfg."""
    guidance = cfg.guidance if guidance is None else guidance
    pictures = model.sample(prompts, cfg.seed + seed, cfg.steps, guidance, batch=40)
    progress(len(prompts))
    return pictures


def progress_of(what: str, total: int, unit: str = "picture") -> Callable[[int], None]:
    """Announces some work; returns a function that is called with how much more of it is done,
    and shows it."""
    print(f"{what}: {total} {unit}s to do", flush=True)
    line, done = Progress(total, unit=unit, stream=sys.stdout), 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        line.show(done, what)
        if done == total:
            line.close()

    return advance


# ---------------------------------------------------------------------------------------------------- legible


def legible(model: TextToImage, data: CaptionedImages, cfg: EvaluateConfig,
            folder: Path) -> tuple[dict, list[str]]:
    """Shares named right by the judge. Captions are read as a character, then its hand."""
    if not cfg.judge:
        print("legibility: skipped (no --judge)")
        return {}, []
    if model.format.channels != 1:
        raise UserError("--judge reads grey pictures; this run writes colour")
    from .glyphs import classify_images, load_judge

    judge = load_judge(cfg.judge)
    characters = list(dict.fromkeys(caption.split()[0] for caption in model.captions))
    strange = [c for c in characters if c not in judge.names]
    if strange:
        raise UserError(f"{cfg.judge}: this judge does not know {'、'.join(strange)}")

    def share(prompts: list[str], pictures: Tensor) -> list[bool]:
        names, _ = classify_images(judge, pictures)
        return [name == prompt.split()[0] for name, prompt in zip(names, prompts, strict=True)]

    rows, results, shown = [], {}, []
    strengths = (0.0, 1.0, 1.5, 2.0, 3.0)
    progress = progress_of("legible", 2 * len(characters) * cfg.count + len(strengths) * len(model.captions))
    for character in characters:
        captions = [c for c in model.captions if c.split()[0] == character]
        with_hands = [captions[i % len(captions)] for i in range(cfg.count)]
        alone = model.completed(character, cfg.count, cfg.seed)
        for label, prompts in (("alone", alone), ("with each hand", with_hands)):
            pictures = draw(model, prompts, cfg, progress)
            right = share(prompts, pictures)
            results[f"legible {character} {label}"] = sum(right) / len(right)
            rows.append([character, label, f"{sum(right)} of {len(right)}"])
            shown.append(pictures)
    for guidance in strengths:
        right = share(model.captions, draw(model, model.captions, cfg, progress, guidance))
        results[f"legible at guidance {guidance:g}"] = sum(right) / len(right)
        rows.append(["each caption once", f"guidance {guidance:g}", f"{sum(right)} of {len(right)}"])
    right = share(data.captions, data.images())
    rows.append(["training pictures", "", f"{sum(right)} of {len(right)}"])
    print("\n".join("legible: " + " ".join(row) for row in rows))
    save_grid(torch.cat(shown), folder / "evaluation_legible.png", columns=cfg.count)
    return results, [
        "<h2>Legible</h2><p>Named right by a classifier that never saw this run.</p>",
        report.picture(folder / "evaluation_legible.png",
                       "Two rows a character: alone, then with each hand in turn"),
        report.table(rows, ["prompt", "", "named right"]),
    ]


# ----------------------------------------------------------------------------------------------------- memory


def memory(model: TextToImage, data: CaptionedImages, cfg: EvaluateConfig,
           folder: Path) -> tuple[dict, list[str]]:
    """Are samples copies? Aligned distances, root mean square in grey levels from -1 to 1."""
    pictures = data.images()
    prompts = [data.captions[i % len(data.captions)] for i in range(max(20, len(data.captions)))][:60]
    samples = draw(model, prompts, cfg, progress_of("memory", len(prompts)))
    copies = jitter(pictures, torch.Generator().manual_seed(cfg.seed))
    pairs = {"samples to nearest training picture": (samples, pictures),
             "jittered copies to nearest training picture": (copies, pictures)}
    if len(pictures) > 1:
        pairs["training pictures to nearest other"] = (pictures, pictures)
    progress = progress_of("memory, aligning", ALIGNMENT_STEPS * len(pairs), "step")
    groups = {name: nearest_aligned(asked, bank, others=asked is bank, progress=progress)
              for name, (asked, bank) in pairs.items()}
    rows = [[name, f"{d.median():.3f}", f"{d.min():.3f}", f"{d.max():.3f}"] for name, d in groups.items()]
    print("\n".join(f"memory: {name}: median {median}, from {low} to {high}"
                    for name, median, low, high in rows))
    results = {f"aligned distance, {name}": d.median().item() for name, d in groups.items()}
    return results, [
        "<h2>Memory</h2><p>Distance after the best affine alignment. Samples as near as jittered copies "
        "would be copies of a training picture, as far as training pictures are from each other new ones; "
        "in between they redraw.</p>", report.table(rows, ["", "median", "least", "most"]),
    ]


ALIGNMENT_STEPS = 80


def nearest_aligned(pictures: Tensor, bank: Tensor, others: bool = False, candidates: int = 3,
                    progress: Callable[[int], None] = lambda more: None) -> Tensor:
    """Distance [N] of each picture to the nearest of the bank, each pair aligned first;
    `others`: not to itself.

    Blurred pictures choose the `candidates` worth aligning.
    """
    def blur(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 9, stride=2, padding=4, count_include_pad=False).flatten(1)

    rough = torch.cdist(blur(pictures), blur(bank))                                 # [N, M]
    if others:
        rough.fill_diagonal_(float("inf"))
    chosen = rough.topk(min(candidates, len(bank) - others), largest=False).indices    # [N, k]
    k = chosen.shape[1]
    distances = aligned_distance(bank[chosen.flatten()], pictures.repeat_interleave(k, dim=0),
                                 progress=progress)
    return distances.reshape(-1, k).min(dim=1).values


def aligned_distance(moving: Tensor, fixed: Tensor, steps: int = ALIGNMENT_STEPS,
                     progress: Callable[[int], None] = lambda more: None) -> Tensor:
    """Least root mean square difference over affine maps of `moving` [P, C, S, S] onto `fixed`,
    pair by pair -> [P].

    Found by Adam from the identity, on blurred pictures first so that strokes need not overlap at the start.
    """
    P, best = len(moving), torch.full((len(moving),), float("inf"))
    theta = torch.eye(2, 3).repeat(P, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.01)
    with torch.enable_grad():
        for step in range(steps):
            warped = F.grid_sample(moving - 1, F.affine_grid(theta, list(moving.shape), align_corners=False),
                                   align_corners=False) + 1
            sharp = (warped - fixed).square().flatten(1).mean(1)
            best = torch.minimum(best, sharp.detach())
            rough = (F.avg_pool2d(warped, 5, 1, 2) - F.avg_pool2d(fixed, 5, 1, 2)).square().flatten(1).mean(1)
            loss = rough if step < steps // 2 else sharp
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            progress(1)
    return best.sqrt()


# ---------------------------------------------------------------------------------------------------- control


CONTROL = (
    "Control: does each setting steer the picture? One of seed, prompt and guidance is changed, the others "
    "stay.",
    "Difference: how far that moves a pixel on the scale from -1 (black) to 1 (white), root mean square over "
    "the picture, mean over the captions; 0 means that the setting does nothing.",
)


def control(model: TextToImage, data: CaptionedImages, cfg: EvaluateConfig,
            folder: Path) -> tuple[dict, list[str]]:
    """Does each control change the picture? Mean root mean square difference when one is changed alone."""
    captions = model.captions[:20]
    progress = progress_of("control", 6 * len(captions))
    base, second, third = (draw(model, captions, cfg, progress, seed=seed) for seed in (0, 1000, 2000))
    others = {"another seed, same prompt": second,
              "another prompt, same seed": draw(model, captions[1:] + captions[:1], cfg, progress),
              "no guidance (0), same seed and prompt": draw(model, captions, cfg, progress, guidance=0.0),
              "strong guidance (3), same seed and prompt": draw(model, captions, cfg, progress, guidance=3.0)}
    rows = [[name, (base - x).square().flatten(1).mean(1).sqrt().mean().item()] for name, x in others.items()]
    print("\n".join([*CONTROL, *(f"control: {name}: difference {value:.3f}" for name, value in rows)]))
    columns = len(captions) if len(captions) > 1 else grid_columns(3)
    save_grid(torch.cat([base, second, third]), folder / "evaluation_seeds.png", columns)
    return {name: value for name, value in rows}, [
        f"<h2>Control</h2><p>{' '.join(CONTROL)}</p>",
        report.table([[name, f"{value:.3f}"] for name, value in rows], ["changed", "difference"]),
        report.picture(folder / "evaluation_seeds.png",
                       "The captions in order, three seeds below each other"),
    ]


if __name__ == "__main__":
    start(lambda: main(parse_flags(EvaluateConfig, __doc__.split("\n\n")[0])))
