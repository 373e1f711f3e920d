"""Against flow's own noising and target."""

import torch
from compare import same

from minidiff import DDPMScheduler, FlowMatchEulerDiscreteScheduler


def check(answer) -> None:
    """At an early, a middle and a late timestep, in float64."""
    flow, diffusion = FlowMatchEulerDiscreteScheduler(), DDPMScheduler(prediction_type="v_prediction")
    diffusion.alphas_cumprod = diffusion.alphas_cumprod.double()
    x0, eps = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    for t in (10, 300, 900):
        a, s = diffusion.signal_and_noise(t)
        x_t, v = a * x0 + s * eps, diffusion.training_target(x0, eps, torch.tensor([t]))
        level = torch.tensor([1000 * s / (a + s)], dtype=torch.float64)
        x, found, u = answer.to_flow(v, x_t, a, s)
        same(found, s / (a + s), f"s at t = {t}", 1e-9, {
            "sigma is a factor on the circle; on the line both factors sum to 1": s,
            "s is a share of the sum, not of the squares": s**2})
        same(x, flow.add_noise(x0, eps, level), f"x_s at t = {t}", 1e-9, {
            "x_t has to be divided by alpha + sigma": x_t})
        same(u, flow.training_target(x0, eps, level), f"u at t = {t}", 1e-9, {
            "v and eps - x0 are not the same": v, "eps - x0 points from the picture to the noise": x0 - eps,
            "u is not scaled: it is eps - x0 itself": (eps - x0) / (a + s)})
