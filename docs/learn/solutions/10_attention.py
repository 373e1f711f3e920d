import torch


def attend(x: torch.Tensor, context: torch.Tensor, Wq: torch.Tensor, Wk: torch.Tensor, Wv: torch.Tensor,
           nh: int) -> torch.Tensor:
    q, k, v = ((a @ W.T).unflatten(-1, (nh, -1)).transpose(1, 2)
               for a, W in ((x, Wq), (context, Wk), (context, Wv)))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
