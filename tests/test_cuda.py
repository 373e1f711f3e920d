"""What only one of NVIDIA's GPUs can show. Skipped without one: no figure of the docs comes from here."""

import pytest
import torch

from minidiff.text_to_image import PRESETS, ImageFormat, build_text_to_image
from tests.test_minidiff_pipeline import draw, make

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("dtype, most", [(torch.float32, 2e-3), (torch.bfloat16, 0.2)])
def test_pictures_are_those_of_the_cpu(dtype, most):
    """One seed, one picture. bfloat16 has 8 bits of precision, and three steps multiply what is lost."""
    wanted = draw(make(), output_type="latent")
    found = draw(make().to("cuda", dtype), output_type="latent").float().cpu()
    assert (found - wanted).norm() / wanted.norm() < most


def test_no_step_waits():
    """As on the meta device, but with CUDA's own word for it."""
    pipe = make().to("cuda")
    draw(pipe, output_type="latent")                            # kernels are loaded at the first call
    counts = []

    def begin(pipe, i, t, values):
        torch.cuda.set_sync_debug_mode("error" if i < 2 else "default")
        counts.append(i)

    try:
        draw(pipe, output_type="latent", callback_on_step_end=begin)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counts == [0, 1, 2]


def test_cuda_graphs():
    """torch.compile's CUDA graphs draw what the plain model draws."""
    pipe = make().to("cuda")
    wanted = draw(pipe, output_type="latent")
    pipe.unet.compile(mode="reduce-overhead", fullgraph=True)
    assert (draw(pipe, output_type="latent") - wanted).norm() / wanted.norm() < 1e-3


def test_attention_is_fused():
    """In half precision a kernel of torch that makes no attention matrix can be taken."""
    pipe = make().to("cuda", torch.bfloat16)
    backends = torch.nn.attention.SDPBackend
    kernels = [backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION]
    with torch.nn.attention.sdpa_kernel(kernels):               # raises where neither can
        pipe.unet(torch.randn(1, 4, 8, 8, device="cuda", dtype=torch.bfloat16), 7,
                  torch.randn(1, 5, 32, device="cuda", dtype=torch.bfloat16))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_training_step(precision):
    model = build_text_to_image(PRESETS["tiny"], ImageFormat(16, 1, 2), ["春 草書"]).to("cuda")
    x0, noise = torch.randn(2, 4, 8, 8, device="cuda"), torch.randn(2, 4, 8, 8)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        loss = model(x0, ["春 草書", ""], torch.tensor([10, 900], device="cuda"), noise)
    loss.backward()
    assert torch.isfinite(loss) and all(p.grad is not None for p in model.parameters())
