"""Against the EMA of the training scripts."""

import torch
from compare import same

from train.run.state import EMA


def check(answer) -> None:
    """Forty steps, with a decay that is reached on the way and one that is not."""
    weights = torch.randn(41, dtype=torch.float64).cumsum(0).tolist()
    for decay in (0.999, 0.7):
        weight = torch.tensor(weights[:1], dtype=torch.float64)
        ema, wanted, constant, early = EMA([weight], decay), [], [weights[0]], [weights[0]]
        for s, value in enumerate(weights[1:], 1):
            weight.fill_(value)
            ema.update(s)
            wanted.append(ema.mean[0].item())
            constant.append(decay * constant[-1] + (1 - decay) * value)
            keep = min(decay, s / (9 + s))
            early.append(keep * early[-1] + (1 - keep) * value)
        same(answer.averages(weights, decay), wanted, f"the means with decay = {decay}", 1e-9, {
            "keep is the smaller of decay and (1 + s) / (10 + s)": constant[1:],
            "the first step is s = 1": early[1:]})
