"""How well a CLIP run finds its way between pictures and names that it was not trained on,
and what that is worth.

    python -m train.evaluate_clip --run out/herbs

Read after train_clip.py, which leaves the run.
Papers: Radford 2021, section 3 (R@k); Efron 1979 (the bootstrap).
Asks about the rows that --hold-out kept back, or about all of them if none were.
Beside the model stand chance and the nearest training picture by colours alone; a run with --shuffle-captions
is the third thing to compare with.
Where --most samples some of the images, the names to choose from stay all,
the images to choose from are those sampled.
Pictures are read once, a batch at a time, and scores compared a block at a time: memory is that of a few
numbers a picture and a name, so a streamed run of any size will do. Broken files are left out.
Leaves RUN/evaluation.json, RUN/evaluation.html and, if files were broken,
their list RUN/evaluation-skipped.txt.
Shapes: N pictures asked about, M names to choose from, K training pictures, C columns of captions,
S picture size, E width of the shared space; n of the N, m of the M and k of the K make a block.
"""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from miniclip.image_text import ImageTextModel
from miniclip.retrieval import RECALL_AT, chance_of_counts, ranks
from miniclip.weights import atomic_write, write_json
from minidiff.optimize import optimize

from . import report
from .data.batches import load_image, readable
from .data.grid import save_grid
from .data.pairs import Pairs, caption_columns_of, list_pairs
from .errors import DataError, UserError
from .pages import WAYS
from .run.cli import MAX_SEED, check_flags, flag, parse_flags, pick_device, read_settings, start
from .run.log import Progress


@dataclass(frozen=True)
class EvaluateConfig:
    """The flags of train.evaluate_clip."""

    run: str = flag("out/herbs", "run folder of train.train_clip")
    most: int = flag(10_000, "ask about at most so many images, sampled at random", at_least=1,
                     at_most=1_000_000)
    every_column: bool = flag(False, "answer with the captions of all columns, each right one counts; else "
                                     "of the first")
    resamples: int = flag(2000, "draws of the bootstrap", at_least=10, at_most=1_000_000)
    shown: int = flag(12, "images to show with their answers", at_least=0, at_most=1_000_000)
    seed: int = flag(0, "of the bootstrap, of the pictures asked about and of those shown", at_least=0,
                     at_most=MAX_SEED)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps")


def main(cfg: EvaluateConfig) -> None:
    """Prints the table of R@k; leaves evaluation.json and evaluation.html in the run folder.

    Raises UserError, DataError for the pictures, WeightsError and ConfigError for the run.
    """
    check(cfg)
    # ---- what is asked
    out, columns = Path(cfg.run), slice(None) if cfg.every_column else slice(1)
    train, pool, rows = read_run(out)
    asked = pool.take(sorted(sampled(len(pool.files), cfg.most, cfg.seed)))
    if len(asked.files) < len(pool.files):
        rows += f", sampled at random from {len(pool.files)}"
    model = optimize(ImageTextModel.load(out / "model")).to(pick_device(cfg.device))
    seen = look(model, asked.files, train.files)
    train, pool, asked = (seen.without_broken(pairs) for pairs in (train, pool, asked))
    names, relevant = answers(train, asked, columns, pool)
    things = asked.captions[0]
    facts = [f"{len(things)} pictures of {len(set(things))} things, {rows}; {len(names)} names to choose "
             "from", *list_broken(out, seen.broken)]
    print("\n".join(facts))

    # ---- the answers
    answered = by_vectors(seen.of(asked, seen.vectors), embed_names(model, names))
    colours = by_colours(train, asked, names, columns,
                         (seen.of(train, seen.colours), seen.of(asked, seen.colours)))
    scores = {"model": measure(answered, relevant, things, cfg.resamples, cfg.seed),
              "nearest by colours": measure(colours, relevant, things, cfg.resamples, cfg.seed),
              "chance": by_chance(relevant)}
    print_table(scores)
    result = {"pictures": len(things), "things": len(set(things)), "names": len(names), "rows": rows,
              **({"broken": len(seen.broken)} if seen.broken else {}), "scores": scores}
    write_json(out / "evaluation.json", result)
    shown = sampled(len(things), cfg.shown, cfg.seed)
    examples = show(out, train, asked, shown, best_names(answered, names, shown), model.size) if shown else []
    write_page(out, facts, scores, examples)
    print(f"open {out / 'evaluation.html'}")


def check(cfg: EvaluateConfig) -> None:
    """Raises UserError for flags out of their limits, and where --run is no run of train.train_clip."""
    check_flags(cfg)
    if not (Path(cfg.run) / "config.json").exists() or not (Path(cfg.run) / "model").is_dir():
        raise UserError(f"--run {cfg.run}: no run of train.train_clip here (it would hold config.json and "
                        "model)")


# ----------------------------------------------------------------------------------------------- the pictures


def read_run(out: Path) -> tuple[Pairs, Pairs, str]:
    """The pairs a run was trained on, those to ask about, both without pixels, and a word for the latter."""
    settings = read_settings(out, data=str, caption_column=str, size=int, seed=int)
    data, hold_out = settings["data"], str(settings.get("hold_out") or "")
    columns = caption_columns_of(data, settings["caption_column"], hold_out)
    index = out if settings.get("stream") else None
    train, test = list_pairs(data, settings["size"], columns, hold_out, settings["seed"], index).split()
    return (train, test, f"held out ({hold_out})") if test.files else (train, train, "all trained on")


def sampled(count: int, most: int, seed: int) -> list[int]:
    """Up to `most` of the numbers below count."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].tolist()


@dataclass(frozen=True)
class Seen:
    """What is kept of the pictures that could be read, in one order: those asked about stand first."""

    place: dict[str, int]       # of a file in that order
    vectors: Tensor             # [those asked about, E]
    colours: Tensor             # [all, 64]
    broken: dict[str, str]      # the other files, and why they could not be read

    def of(self, pairs: Pairs, values: Tensor) -> Tensor:
        """The rows of `values` for these pairs, in their order. Raises KeyError for a broken file."""
        return values[[self.place[file] for file in pairs.files]]

    def without_broken(self, pairs: Pairs) -> Pairs:
        """The pairs whose files could be read."""
        return pairs.take([i for i, file in enumerate(pairs.files) if file not in self.broken])


def look(model: ImageTextModel, asked: list[str], others: list[str]) -> Seen:
    """Reads each file once, 256 in memory at a time. Raises DataError if none of those asked about can be
    read."""
    files, to_embed = list(dict.fromkeys([*asked, *others])), len(set(asked))
    progress = Progress(len(files), unit="picture")
    place, vectors, messages = {}, [], []
    colours = torch.empty(len(files), 64)       # filled, not stacked: see places_of
    for places, pictures in readable(files, model.size, messages):
        if first := sum(i < to_embed for i in places):
            vectors.append(model.embed_images(pictures[:first]))
        colours[len(place):len(place) + len(places)] = histogram(pictures)
        place |= {files[i]: len(place) + row for row, i in enumerate(places)}
        progress.show(len(place) + len(messages), f"{len(messages)} broken")
    progress.close()
    if not vectors:
        raise DataError(f"none of the {to_embed} pictures asked about can be read: {messages[0]}")
    broken = dict(zip((file for file in files if file not in place), messages, strict=True))
    return Seen(place, torch.cat(vectors), colours[:len(place)], broken)


def list_broken(out: Path, broken: dict[str, str]) -> list[str]:
    """Leaves the list in the run folder, in place of that of an earlier evaluation;
    the line to say, if there is one."""
    path = out / "evaluation-skipped.txt"
    path.unlink(missing_ok=True)
    if not broken:
        return []
    with atomic_write(path) as file:
        file.write("".join(message + "\n" for message in broken.values()).encode("utf-8", "replace"))
    return [f"{len(broken)} broken files left out ({path})"]


# ---------------------------------------------------------------------------------------------- the questions


CELLS = 2**24               # the most scores that a block holds
Rows = Tensor | slice       # numbers of pictures or of names
Scores = Callable[[Rows, Rows], Tensor]     # any pictures [n], any names [m] -> how well they match [n, m]


@dataclass(frozen=True)
class Relevant:
    """Which of M names are right for each of N pictures: a matrix [N, M] of bools,
    too large to be held as one."""

    own: Tensor             # [N, C]: numbers of a picture's names, one from each column of captions
    names: int              # M

    def block(self, pictures: Rows, names: Rows) -> Tensor:
        """[n], [m] -> [n, m]."""
        return (self.own[pictures][:, :, None] == torch.arange(self.names)[names]).any(dim=1)

    def counts(self) -> tuple[Tensor, Tensor]:
        """How many names each picture has [N], and how many pictures each name [M]."""
        picture = torch.arange(len(self.own))[:, None].expand_as(self.own)
        once = torch.stack([picture, self.own]).flatten(1).unique(dim=1)       # two columns may hold one name
        return once[0].bincount(minlength=len(self.own)), once[1].bincount(minlength=self.names)

    def asked_names(self) -> tuple[Tensor, Tensor]:
        """The names that have a picture, ascending, and the first picture of each: [W], [W]."""
        # [W], [N, C]
        names, which = self.own.unique(return_inverse=True)
        picture = torch.arange(len(self.own))[:, None].expand_as(which)
        first = torch.full_like(names, len(self.own))
        return names, first.scatter_reduce_(0, which.flatten(), picture.flatten(), "amin")


def answers(train: Pairs, asked: Pairs, columns: slice = slice(1),
            pool: Pairs | None = None) -> tuple[list[str], Relevant]:
    """The distinct names [M] of all pictures, and which of them are right for each picture asked about.

    pool: those that the pictures asked about were drawn from, whose names are to choose from as well.
    """
    names = list(dict.fromkeys(name for pairs in (train, pool or asked) for column in pairs.captions[columns]
                               for name in column))
    return names, Relevant(numbers(asked, names, columns), len(names))


def numbers(pairs: Pairs, names: list[str], columns: slice) -> Tensor:
    """[pictures, C]: the places of their captions among the names."""
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([[place[name] for name in column] for column in pairs.captions[columns]],
                        dtype=torch.long).T


def embed_names(model: ImageTextModel, names: list[str], batch: int = 256) -> Tensor:
    """[M, E]."""
    progress, parts = Progress(len(names), unit="name"), []
    for first in range(0, len(names), batch):
        parts.append(model.embed_texts(names[first:first + batch]))
        progress.show(min(first + batch, len(names)), "embedded")
    progress.close()
    return torch.cat(parts)


def by_vectors(pictures: Tensor, names: Tensor) -> Scores:
    """[N, E], [M, E]: how the model answers."""
    return lambda rows, columns: pictures[rows] @ names[columns].T


def by_matrix(similarity: Tensor) -> Scores:
    """Scores [N, M] that are there already."""
    return lambda rows, columns: similarity[rows][:, columns]


def by_colours(train: Pairs, asked: Pairs, names: list[str], columns: slice = slice(1),
               colours: tuple[Tensor, Tensor] | None = None) -> Scores:
    """How alike the colours of a picture and of the nearest training picture of each name are.

    A name that no training picture carries is never the answer.
    colours: histograms of the training pictures [K, 64] and of those asked about [N, 64];
    else those of their pixels.
    """
    of_train, of_asked = colours or (histogram(train.images), histogram(asked.images))
    # [K, C]
    carried = numbers(train, names, columns)

    def score(pictures: Rows, wanted: Rows) -> Tensor:
        # [n, 64], [m]
        mine, wanted = of_asked[pictures], torch.arange(len(names))[wanted]
        # also the column of all that is not wanted
        m = len(wanted)
        # [K, C]
        column = torch.full((len(names),), m).index_copy_(0, wanted, torch.arange(m))[carried]
        best = mine.new_full((len(mine), m + 1), -9.0)
        useful = (column < m).any(dim=1).nonzero()[:, 0]
        for k in useful.split(rows_of_width(len(mine))):
            # [n, k]
            alike = -torch.cdist(mine, of_train[k], p=1)
            for to in column[k].T:
                best.scatter_reduce_(1, to.expand_as(alike), alike, "amax")
        return best[:, :m]

    return score


def histogram(pictures: Tensor, bins: int = 4) -> Tensor:
    """[N, 3, S, S] in -1..1 -> [N, bins^3] shares of the pixels, by red, green and blue together."""
    # [N, 3, S, S]
    level = ((pictures + 1) / 2 * bins).long().clamp(0, bins - 1)
    # [N, S*S]
    index = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)
    counts = torch.zeros(len(pictures), bins**3).scatter_add_(1, index, torch.ones(index.shape))
    return counts / index.shape[1]


# ----------------------------------------------------------------------------------------------- the measures


def measure(similarity: Scores | Tensor, relevant: Relevant, things: list[str], resamples: int = 2000,
            seed: int = 0) -> dict:
    """R@1 and R@5 both ways with 95 % intervals. similarity: any block of [N pictures, M names],
    or all; things: N.

    The interval resamples whole things, with all the pictures and names of each: two pictures of one thing
    are not two independent pieces of evidence. The answers to choose from stay all of them.
    """
    score = by_matrix(similarity) if isinstance(similarity, Tensor) else similarity
    number = {thing: i for i, thing in enumerate(dict.fromkeys(things))}
    of_picture = torch.tensor([number[thing] for thing in things])                                     # [N]
    wanted, first = relevant.asked_names()              # a name without a picture here is not asked for
    every, pictures = slice(None), torch.arange(len(things))
    ways = {"image_to_text": (of_picture, places_of(pictures, relevant.names, lambda some: (
                score(some, every), relevant.block(some, every)))),
            "text_to_image": (of_picture[first], places_of(wanted, len(things), lambda some: (
                score(every, some).T, relevant.block(every, some).T)))}
    scores = {}
    for way, (of, place) in ways.items():
        for k in RECALL_AT:
            hit = (place < k).double()
            scores[f"{way}_R@{k}"] = [hit.mean().item(), *interval(hit, of, len(number), resamples, seed)]
    return scores


def places_of(queries: Tensor, answers: int, block: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """[Q]: the place, from 0, of the best right answer to each query.
    block: some queries -> their scores, which are right.

    Filled, not stacked: small tensors that are kept between large ones would leave the heap full of holes.
    """
    found, rows = torch.empty_like(queries), rows_of_width(answers)
    for some_queries, part in zip(queries.split(rows), found.split(rows), strict=True):
        part.copy_(ranks(*block(some_queries)))
    return found


def rows_of_width(width: int) -> int:
    """How many rows of so many scores make a block."""
    return max(1, CELLS // width)


def interval(hit: Tensor, of: Tensor, things: int, resamples: int, seed: int) -> tuple[float, float]:
    """The 2.5 and 97.5 % points of the mean of hit [Q] over draws, with replacement,
    of the things `of` [Q]."""
    hits = torch.zeros(things, dtype=torch.double).index_add_(0, of, hit)
    asked = torch.zeros(things, dtype=torch.double).index_add_(0, of, torch.ones_like(hit))
    generator, means = torch.Generator().manual_seed(seed), []
    for draws in torch.arange(resamples).split(rows_of_width(things)):
        drawn = torch.randint(things, (len(draws), things), generator=generator)
        means.append(hits[drawn].sum(dim=1) / asked[drawn].sum(dim=1).clamp_min(1))
    return tuple(torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.double)).tolist())


def by_chance(relevant: Relevant) -> dict[str, list[float]]:
    """R@1 and R@5 of answers in random order: exact, so without an interval."""
    of_picture, of_name = relevant.counts()
    ways = {"image_to_text": (of_picture, len(of_name)),
            "text_to_image": (of_name[of_name > 0], len(of_picture))}
    return {f"{way}_R@{k}": [chance_of_counts(right.tolist(), of, k)] for k in RECALL_AT
            for way, (right, of) in ways.items()}


# ---------------------------------------------------------------------------------------------------- telling


HEADER = ["", *(f"{way}, R@{k}" for way in WAYS for k in RECALL_AT)]


def rows_of(scores: dict[str, dict]) -> list[list[str]]:
    """A line for each method: 0.512 [0.488, 0.537]."""
    return [[name, *(written(found[f"{key}_R@{k}"]) for key in WAYS.values() for k in RECALL_AT)]
            for name, found in scores.items()]


def written(value: list[float]) -> str:
    """0.512 [0.488, 0.537], or 0.0123 where there is no interval."""
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" if len(value) == 3 else f"{value[0]:.4f}"


def print_table(scores: dict[str, dict]) -> None:
    """The table as Markdown, so that it can be pasted where it is quoted."""
    for row in (HEADER, ["---"] * len(HEADER), *rows_of(scores)):
        print("| " + " | ".join(row) + " |")


def write_page(out: Path, facts: list[str], scores: dict, examples: list[str]) -> None:
    """Leaves evaluation.html in the folder. facts: plain text; examples: HTML."""
    report.write_page(out / "evaluation.html", f"What {out.name} finds", [
        *(f"<p>{html.escape(line)}.</p>" for line in facts), report.table(rows_of(scores), HEADER),
        "<p class='note'>In brackets: 95 % of the results if other things of this kind were sampled.</p>",
        *examples])


def best_names(score: Scores, names: list[str], pictures: list[int], most: int = 3) -> list[list[str]]:
    """The names that match each of these pictures best, best first."""
    rows = torch.tensor(pictures, dtype=torch.long).split(rows_of_width(len(names)))
    best = torch.cat([score(some, slice(None)).topk(min(most, len(names)), dim=1).indices for some in rows])
    return [[names[j] for j in found] for found in best.tolist()]


def show(out: Path, train: Pairs, asked: Pairs, shown: list[int], found: list[list[str]],
         size: int) -> list[str]:
    """Some of the pictures asked about with the names found for them, as parts of the page.
    Reads just these again."""
    save_grid(pairs_of_pictures(train, asked, shown, [names[0] for names in found], size),
              out / "answers.png", len(shown))
    lines = [[asked.captions[0][i], "; ".join(names)] for i, names in zip(shown, found, strict=True)]
    return [f"<h2>{len(shown)} pictures sampled at random</h2>",
            report.picture(out / "answers.png",
                           "above: asked; below: a training picture of the first answer"),
            report.table(lines, ["what it is", "answers, best first"])]


def pairs_of_pictures(train: Pairs, asked: Pairs, shown: list[int], answered: list[str], size: int) -> Tensor:
    """[2 * shown, 3, S, S]: the pictures asked about, then one of training for each answer,
    or a grey field."""
    first = {name: file for column in train.captions
             for file, name in reversed(list(zip(train.files, column, strict=True)))}
    below = [load_image(first[name], size) if name in first else torch.zeros(3, size, size)
             for name in answered]
    return torch.stack([load_image(asked.files[i], size) for i in shown] + below)


if __name__ == "__main__":
    start(lambda: main(parse_flags(EvaluateConfig, __doc__.split("\n\n")[0])))
