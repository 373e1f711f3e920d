"""Against DDIMScheduler.step in float64, to 1e-12; and against DDPM's mean."""

import torch
from compare import same

from minidiff import DDIMScheduler


def check(answer) -> str:
    """Twenty steps, at three of them, with eta 0, 1 and between."""
    sampler = DDIMScheduler(clip_sample=False)
    sampler.set_timesteps(20)
    sampler.alphas_cumprod = sampler.alphas_cumprod.double()
    x_t, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for t in (950, 500, 50):
        a, a_prev = (sampler.alphas_cumprod[i].item() for i in (t, t - 50))
        for eta in (0.0, 1.0, 0.5):
            wanted = sampler.step(eps, t, x_t, eta, variance_noise=torch.zeros_like(x_t)).prev_sample
            x0 = (x_t - (1 - a) ** 0.5 * eps) / a**0.5
            plain = a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * eps
            deviation = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
            same(answer.step(x_t, eps, a, a_prev, eta), wanted, f"x_prev, eta = {eta}, t = {t}", 1e-12, {
                "fresh noise of variance sigma^2 leaves less room for eps": plain,
                "what is added is the noise eps, not x_t": a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * x_t,
                "the direction stands under a root": a_prev**0.5 * x0 + (1 - a_prev) * eps,
                "eta multiplies sigma, so the variance has eta^2":
                    a_prev**0.5 * x0 + (1 - a_prev - eta * deviation**2) ** 0.5 * eps})
    same(answer.step(x_t, eps, 0.3, 0.4, 1.0), answer.ddpm_mean(x_t, eps, 0.3, 0.4), "eta = 1", 1e-12)
    return "equal to DDIMScheduler to 1e-12, and with eta = 1 to DDPM's mean"
