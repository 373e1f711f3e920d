def averages(weights: list[float], decay: float) -> list[float]:
    mean, means = weights[0], []
    for s, weight in enumerate(weights[1:], 1):
        keep = min(decay, (1 + s) / (10 + s))
        mean = keep * mean + (1 - keep) * weight
        means.append(mean)
    return means
