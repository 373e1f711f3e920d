"""Against optimal_denoiser."""

import torch
from compare import same

from train.validation import optimal_denoiser


def check(answer) -> None:
    """Four pictures, from little noise to much."""
    pictures = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    noise = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    for alpha, sigma in ((0.6, 0.8), (0.3, 0.954), (0.995, 0.1)):
        x_t = alpha * pictures[torch.arange(6) % 4] + sigma * noise
        flat = pictures.flatten(1)
        gaps = torch.cdist(x_t.flatten(1), alpha * flat)

        def mean(exponent, flat=flat, x_t=x_t):
            return (exponent.softmax(1) @ flat).reshape(x_t.shape)

        same(answer.denoise(x_t, pictures, alpha, sigma), optimal_denoiser(x_t, pictures, alpha, sigma),
             f"the guess at sigma = {sigma}", 1e-8, {
            "the distance is squared": mean(-gaps / (2 * sigma**2)),
            "sigma is squared": mean(-gaps**2 / (2 * sigma)),
            "a Gaussian has 2 sigma^2 below the square": mean(-gaps**2 / sigma**2),
            "the distance is to alpha x_i": mean(-torch.cdist(x_t.flatten(1), flat) ** 2 / (2 * sigma**2)),
            "the mean of all, weighted, not the nearest alone": pictures[gaps.argmin(1)]})
