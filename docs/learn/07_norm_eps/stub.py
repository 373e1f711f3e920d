"""Why does eps = 1e-5 fail parity? docs/learn/07_norm_eps/page.md"""


def eps_of(name: str) -> float:
    """The eps of a norm of Stable Diffusion's UNet, by its name in unet.named_modules()."""
    raise NotImplementedError


def ratio(variance: float) -> float:
    """Output of a norm with eps 1e-5, divided by its output with 1e-6."""
    raise NotImplementedError
