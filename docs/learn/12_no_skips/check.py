"""Against UpBlock with zeroed skips; then two short trainings."""

import torch
from compare import same
from torch import Tensor

from minidiff import DDPMScheduler, UNet2DConditionModel
from minidiff.unet import UpBlock

PIXELS, BATCH, STEPS = 8, 8, 60


def tiny_unet() -> UNet2DConditionModel:
    """Two levels, no attention; the same first weights each time."""
    torch.manual_seed(0)
    return UNet2DConditionModel(in_channels=1, out_channels=1, block_out_channels=(16, 32), norm_num_groups=8,
                                layers_per_block=1, mid_block_type=None,
                                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)


def trained_loss() -> float:
    """Of a tiny UNet that learns to see the noise in eight random pictures; the mean of its last steps."""
    unet, scheduler = tiny_unet(), DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    dice = torch.Generator().manual_seed(1)
    pictures = torch.randint(2, (8, 1, PIXELS, PIXELS), generator=dice) * 2.0 - 1
    losses = []
    for _ in range(STEPS):
        x0 = pictures[torch.randint(len(pictures), (BATCH,), generator=dice)]
        eps, t = torch.randn(x0.shape, generator=dice), torch.randint(1000, (BATCH,), generator=dice)
        loss = (unet(scheduler.add_noise(x0, eps, t), t).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@torch.no_grad()
def check_block(answer) -> None:
    """One block that doubles the size and one that does not."""
    for block, last in zip(tiny_unet().up_blocks, (32, 16)):            # channels of the last skip
        skips = [torch.randn(2, 16, 7, 7), torch.randn(2, 16, 4, 4), torch.randn(2, last, 4, 4)]
        h = torch.randn(2, block.resnets[0].conv1.in_channels - last, 4, 4)
        temb = torch.randn(2, 64)
        zeroed, given = [torch.zeros_like(skip) for skip in skips], list(skips)
        wanted = block(h, zeroed, temb, ())
        found = answer.up_without_skips(block, h, given, temb)
        assert len(given) == 1, f"{3 - len(given)} skips were taken off the stack by 2 resnets"
        same(found, wanted, "the block's map", 1e-5, {
            "the skips are still in": block(h, list(skips), temb, ())})


def check(answer) -> str:
    """The block, then the prediction."""
    check_block(answer)
    kinds = ("lower", "about equal", "higher")
    assert answer.PREDICTION in kinds, f"PREDICTION is {answer.PREDICTION!r}, not one of {', '.join(kinds)}"
    real = UpBlock.forward

    def forward(block, h: Tensor, skips: list[Tensor], temb: Tensor, text: tuple) -> Tensor:
        return answer.up_without_skips(block, h, skips, temb)

    with_skips = trained_loss()
    UpBlock.forward = forward
    try:
        without = trained_loss()
    finally:
        UpBlock.forward = real
    kind = kinds[1 + (without > 1.1 * with_skips) - (with_skips > 1.1 * without)]
    figures = f"after {STEPS} steps the loss is {with_skips:.2f} with skips, {without:.2f} without"
    assert kind == answer.PREDICTION, f"PREDICTION is {answer.PREDICTION!r}, but {figures}"
    return figures
