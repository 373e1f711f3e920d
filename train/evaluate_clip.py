"""How well a CLIP run finds its way between pictures and names that it was not trained on, and what that is worth.

    python -m train.evaluate_clip --run out/herbs

Read after train_clip.py, which leaves the run. Papers: Radford 2021, section 3 (R@k); Efron 1979 (the bootstrap).
Asks about the rows that --hold-out kept back, or about all of them if none were. Beside the model stand chance and
the nearest training picture by colours alone; a run with --shuffle-captions is the third thing to compare with.
Leaves RUN/evaluation.json and RUN/evaluation.html.
Shapes: N pictures asked about, M names to choose from, K training pictures, E width of the shared space.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miniclip.loss import chance, ranks
from miniclip.weights import read_json, write_json
from train import report
from train.common import UserError, flag, parse_flags, pick_device, run, save_grid
from train.matcher import Matcher
from train.train_clip import WAYS, Pairs, TrainConfig, read_pairs


@dataclass(frozen=True)
class EvaluateConfig:
    run: str = flag("out/herbs", "run folder of train.train_clip")
    every_column: bool = flag(False, "answer with the captions of all columns, each right one counts; else of the first")
    resamples: int = flag(2000, "draws of the bootstrap")
    shown: int = flag(12, "pictures to show with their answers")
    seed: int = flag(0, "of the bootstrap and of the pictures shown")
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: EvaluateConfig) -> None:
    check(cfg)
    out = Path(cfg.run)
    train, asked, held_out = read_run(out)
    matcher = Matcher.load(out / "model").to(pick_device(cfg.device))
    columns = slice(None) if cfg.every_column else slice(1)
    names, relevant = answers(train, asked, columns)
    similarity = matcher.embed_pictures(asked.pictures) @ matcher.embed_texts(names).T                 # [N, M]

    things = asked.captions[0]
    result = {"pictures": len(things), "things": len(set(things)), "names": len(names), "rows": held_out, "scores": {
        "model": measure(similarity, relevant, things, cfg.resamples, cfg.seed),
        "nearest by colours": measure(by_colours(train, asked, names, columns), relevant, things, cfg.resamples, cfg.seed),
        "chance": by_chance(relevant)}}
    title = f"{len(things)} pictures of {len(set(things))} things, {held_out}; {len(names)} names to choose from"
    print(title)
    tell(result["scores"])
    write_json(out / "evaluation.json", result)
    write_page(out, title, result["scores"], train, asked, names, similarity, cfg)
    print(f"open {out / 'evaluation.html'}")


def check(cfg: EvaluateConfig) -> None:
    for name, least in (("resamples", 10), ("shown", 0)):
        if not least <= getattr(cfg, name) <= 1_000_000:
            raise UserError(f"--{name} {getattr(cfg, name)}: at least {least}")
    if not (Path(cfg.run) / "config.json").exists() or not (Path(cfg.run) / "model").is_dir():
        raise UserError(f"--run {cfg.run}: no run of train.train_clip here (it would hold config.json and model)")


def read_run(out: Path) -> tuple[Pairs, Pairs, str]:
    """The pairs a run was trained on, those to ask about, and a word for the latter."""
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    trained = TrainConfig(**{k: v for k, v in read_json(out / "config.json").items() if k in known})
    train, test = read_pairs(trained).split()
    return (train, test, f"held out ({trained.hold_out})") if test.files else (train, train, "all trained on")


# ------------------------------------------------------------------------------------------------ the questions


def answers(train: Pairs, asked: Pairs, columns: slice = slice(1)) -> tuple[list[str], Tensor]:
    """The distinct names [M] of all pictures, and which of them are right for each picture asked about: [N, M]."""
    names = list(dict.fromkeys(name for pairs in (train, asked) for column in pairs.captions[columns] for name in column))
    return names, is_named(asked, names, columns)


def is_named(pairs: Pairs, names: list[str], columns: slice) -> Tensor:
    """[N, M]: whether a picture carries a name in one of the columns."""
    place = {name: i for i, name in enumerate(names)}
    found = torch.zeros(len(pairs.files), len(names), dtype=torch.bool)
    for column in pairs.captions[columns]:
        found[torch.arange(len(column)), [place[name] for name in column]] = True
    return found


def by_colours(train: Pairs, asked: Pairs, names: list[str], columns: slice = slice(1)) -> Tensor:
    """[N, M]: how alike the colours of a picture and of the nearest training picture of each name are.

    A name that no training picture carries is never the answer.
    """
    alike = -torch.cdist(histogram(asked.pictures), histogram(train.pictures), p=1)                    # [N, K]
    known = is_named(train, names, columns)                                                            # [K, M]
    scores = [alike[:, rows].max(dim=1).values if rows.any() else alike.new_full((len(alike),), -9.0) for rows in known.T]
    return torch.stack(scores, dim=1)


def histogram(pictures: Tensor, bins: int = 4) -> Tensor:
    """[N, 3, S, S] in -1..1 -> [N, bins^3] shares of the pixels, by red, green and blue together."""
    level = ((pictures + 1) / 2 * bins).long().clamp(0, bins - 1)                                      # [N, 3, S, S]
    index = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)                       # [N, S*S]
    counts = torch.zeros(len(pictures), bins**3).scatter_add_(1, index, torch.ones(index.shape))
    return counts / index.shape[1]


# ------------------------------------------------------------------------------------------------- the measures


def measure(similarity: Tensor, relevant: Tensor, things: list[str], resamples: int = 2000, seed: int = 0) -> dict:
    """R@1 and R@5 both ways with 95 % intervals. similarity, relevant: [N pictures, M names]; things: N.

    The interval resamples whole things, with all the pictures and names of each: two pictures of one thing are not
    two independent pieces of evidence. The answers to choose from stay all of them.
    """
    number = {thing: i for i, thing in enumerate(dict.fromkeys(things))}
    of_picture = torch.tensor([number[thing] for thing in things])                                     # [N]
    wanted = relevant.any(dim=0)                        # a name without a picture here is not asked for
    of_name = of_picture[relevant.int().argmax(dim=0)][wanted]                                         # [names asked]
    ways = {"image_to_text": (similarity, relevant, of_picture),
            "text_to_image": (similarity.T[wanted], relevant.T[wanted], of_name)}
    scores = {}
    for way, (s, r, of) in ways.items():
        place = ranks(s, r)
        for k in (1, 5):
            hit = (place < k).double()
            scores[f"{way}_R@{k}"] = [hit.mean().item(), *interval(hit, of, len(number), resamples, seed)]
    return scores


def interval(hit: Tensor, of: Tensor, things: int, resamples: int, seed: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % points of the mean of hit [Q] over draws, with replacement, of the things `of` [Q]."""
    hits = torch.zeros(things, dtype=torch.double).index_add_(0, of, hit)
    asked = torch.zeros(things, dtype=torch.double).index_add_(0, of, torch.ones_like(hit))
    dice = torch.Generator().manual_seed(seed)
    drawn = torch.randint(things, (resamples, things), generator=dice)
    means = hits[drawn].sum(dim=1) / asked[drawn].sum(dim=1).clamp_min(1)
    return tuple(torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist())


def by_chance(relevant: Tensor) -> dict[str, list[float]]:
    asked = relevant.T[relevant.any(dim=0)]
    return {f"{way}_R@{k}": [chance(r, min(k, r.shape[1]))] for k in (1, 5)
            for way, r in (("image_to_text", relevant), ("text_to_image", asked))}


# ------------------------------------------------------------------------------------------------------- telling


HEADER = ["", *(f"{way}, R@{k}" for way in WAYS for k in (1, 5))]


def rows_of(scores: dict[str, dict]) -> list[list[str]]:
    """A line for each method: 0.512 [0.488, 0.537]."""
    return [[name, *(written(found[f"{key}_R@{k}"]) for key in WAYS.values() for k in (1, 5))]
            for name, found in scores.items()]


def written(value: list[float]) -> str:
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if len(value) == 3 else f"{value[0]:.4f}"


def tell(scores: dict[str, dict]) -> None:
    """The table as Markdown, so that it can be pasted where it is quoted."""
    for row in (HEADER, ["---"] * len(HEADER), *rows_of(scores)):
        print("| " + " | ".join(row) + " |")


def write_page(out: Path, title: str, scores: dict, train: Pairs, asked: Pairs, names: list[str], similarity: Tensor,
               cfg: EvaluateConfig) -> None:
    parts = [f"<p>{title}.</p>", report.table(rows_of(scores), HEADER),
             "<p class='note'>In brackets: 95 % of the results if other things of this kind were drawn.</p>"]
    dice = torch.Generator().manual_seed(cfg.seed)
    shown = torch.randperm(len(asked.files), generator=dice)[:cfg.shown].tolist()
    if shown:
        best = similarity[shown].topk(min(3, len(names)), dim=1).indices.tolist()
        save_grid(pairs_of_pictures(train, asked, shown, [names[b[0]] for b in best]), out / "answers.png", len(shown))
        lines = [[asked.captions[0][i], "; ".join(names[j] for j in b)] for i, b in zip(shown, best, strict=True)]
        parts += [f"<h2>{len(shown)} pictures drawn by lot</h2>",
                  report.picture(out / "answers.png", "above: asked; below: a training picture of the first answer"),
                  report.table(lines, ["what it is", "answers, best first"])]
    report.write_page(out / "evaluation.html", f"What {out.name} finds", parts)


def pairs_of_pictures(train: Pairs, asked: Pairs, shown: list[int], answered: list[str]) -> Tensor:
    """[2 * shown, 3, S, S]: the pictures asked about, then one of training for each answer, or a grey field."""
    first = {name: i for column in train.captions for i, name in reversed(list(enumerate(column)))}
    grey = torch.zeros_like(asked.pictures[0])
    below = [train.pictures[first[name]] if name in first else grey for name in answered]
    return torch.stack([asked.pictures[i] for i in shown] + below)


if __name__ == "__main__":
    run(lambda: main(parse_flags(EvaluateConfig, __doc__.split("\n\n")[0])))
