"""Why do the averaged weights start young? docs/learn/15_ema/page.md"""


def averages(weights: list[float], decay: float) -> list[float]:
    """The mean after each step s = 1, 2, ...; weights[0] is the start, weights[s] what step s left."""
    raise NotImplementedError
