"""R@k: how often the right answer is among the k best, and how often it would be by chance.

Read after loss.py. Papers: Radford 2021, section 3 (R@k in both directions). Every matching caption counts.
Shapes: Q queries, N answers to choose from; from `scores_both_ways` on, N images and M captions.
"""

from __future__ import annotations

import math

from torch import Tensor

RECALL_AT = (1, 5)      # the k that are reported


def ranks(similarity: Tensor, relevant: Tensor) -> Tensor:
    """Place, from 0, of the best relevant item for each query: [Q, N] scores and bools -> [Q].

    An item counts as ahead if its score is at least as high, so that equal scores are no success.
    """
    if not relevant.any(dim=1).all():
        raise ValueError("ranks: a query has no relevant item")
    best = similarity.masked_fill(~relevant, float("-inf")).max(dim=1, keepdim=True).values
    return ((similarity >= best) & ~relevant).sum(dim=1)


def recall(similarity: Tensor, relevant: Tensor, k: int = 1) -> float:
    """R@k: the share of queries with a relevant item among the k best. Every matching caption counts."""
    return (ranks(similarity, relevant) < k).double().mean().item()


def chance(relevant: Tensor, k: int = 1) -> float:
    """R@k of a random order: 1 - C(N - r, k) / C(N, k), averaged over queries with r relevant items of N."""
    return chance_of_counts(relevant.sum(dim=1).tolist(), relevant.shape[1], k)


def chance_of_counts(relevant: list[int], N: int, k: int = 1) -> float:
    """`chance` where only the numbers of relevant items are known, r for each query."""
    missed = [math.comb(N - r, k) / math.comb(N, k) if k <= N else 0.0 for r in relevant]
    return 1 - sum(missed) / len(missed)


def scores_both_ways(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@1 by chance, image to text and text to image.
    similarity, relevant: [N images, M captions].

    A caption without an image here is not asked for.
    """
    asked = relevant.any(dim=0)
    ways = {"image_to_text": (similarity, relevant),
            "text_to_image": (similarity.T[asked], relevant.T[asked])}
    scores = {}
    for way, (s, r) in ways.items():
        place = ranks(s, r)
        scores |= {f"{way}_R@{k}": (place < k).double().mean().item() for k in RECALL_AT}
        scores[f"{way}_chance"] = chance(r)
    return scores
