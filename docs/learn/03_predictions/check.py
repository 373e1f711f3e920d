"""Against to_x0 and to_eps, in float64."""

import torch
from compare import same

from minidiff import DDPMScheduler
from minidiff.schedule import to_eps, to_x0, training_target


def check(answer) -> str:
    """At an early, a middle and a late timestep."""
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for t in (10, 400, 990):
        a, s = DDPMScheduler().signal_and_noise(t)
        x_t, v = a * x0 + s * eps, training_target("v_prediction", x0, eps, a, s)
        same(answer.x0_from_eps(eps, x_t, a, s), to_x0("epsilon", eps, x_t, a, s),
             f"x0 from eps at t = {t}", 1e-9, {
            "divide by alpha as well": x_t - s * eps, "divide by alpha, not multiply": (x_t - s * eps) * a})
        same(answer.x0_from_v(v, x_t, a, s), to_x0("v_prediction", v, x_t, a, s),
             f"x0 from v at t = {t}", 1e-9, {
            "the sign of v": a * x_t + s * v, "alpha and sigma changed places": s * x_t - a * v})
        same(answer.eps_from_v(v, x_t, a, s), to_eps("v_prediction", v, x_t, a, s),
             f"eps from v at t = {t}", 1e-9, {
            "the sign of x_t": a * v - s * x_t, "alpha and sigma changed places": s * v + a * x_t})
    return f"at t = 990 an error in eps becomes {s / a:.0f} times as large in x0; one in v, {s:.2f} times"
