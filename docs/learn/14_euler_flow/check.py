"""Against euler_walk, with the perfect model of two pictures."""

import torch
from compare import same

from minidiff.objective import euler_walk, straight_paths
from train.validation import optimal_denoiser


def check(answer) -> str:
    """1, 2 and 10 steps; then one picture, where one step has to be enough."""
    pictures, noise = torch.randn(2, 1, 4, 4), torch.randn(3, 1, 4, 4)

    def model(known):
        def predict(x, t):
            s = min(float(t) / 1000, 0.999999)              # of s = 1 alone x says nothing of x0
            assert s > 0, "predict was called at t = 0, where there is nothing left to do"
            calls.append(s)
            return (x - optimal_denoiser(x, known, 1 - s, s)) / s
        return predict

    def walked(n):
        timesteps, step = euler_walk(straight_paths(), n, None)
        x = noise
        for t in timesteps:
            x = step(model(pictures)(x, t), t, x).prev_sample
        return x

    calls = []
    for n in (1, 2, 10):
        wanted = walked(n)
        calls.clear()
        found = answer.sample(model(pictures), noise, n)
        assert len(calls) == n, f"predict was called {len(calls)} times for {n} steps"
        assert calls[0] > 0.9, f"the first call was at t = {1000 * calls[0]:g}, not at 1000"
        same(found, wanted, f"the picture of {n} steps", 1e-4)
    only = pictures[:1].expand(3, -1, -1, -1)
    same(answer.sample(model(pictures[:1]), noise, 1), only, "the only picture", 1e-4)
    gap = [(walked(n) - walked(50)).abs().mean().item() for n in (1, 10)]
    return f"with two pictures 1 step is {gap[0]:.2f} away from where 50 lead, 10 steps are {gap[1]:.2g}"
