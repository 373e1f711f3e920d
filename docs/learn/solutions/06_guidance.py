from collections.abc import Callable

import torch


def guided(predict: Callable[..., torch.Tensor], x: torch.Tensor, t: float, free: torch.Tensor,
           text: torch.Tensor, s: float) -> torch.Tensor:
    eps_free, eps_text = predict(torch.cat([x, x]), t, torch.cat([free, text])).chunk(2)
    return eps_free + s * (eps_text - eps_free)
