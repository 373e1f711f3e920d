"""Rows of one model's answer: SD 1.5's UNet, the decoder of its VAE, CLIP B/32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from miniclip import CLIPConfig, CLIPModel, convert
from minidiff import AutoencoderKL, UNet2DConditionModel
from tests.bench.engines import Forward
from tests.bench.measure import Program

UNET = {"cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


class Unet(Forward):
    """One prediction of noise, at 64 x 64 and 77 tokens."""

    rounds = 3

    def __init__(self, name: str, folder: Path, *rest, batch: int = 1, **options):
        super().__init__(name, folder, *rest, **options)
        self.title = f"SD 1.5's UNet, {batch} x 4 x 64 x 64, 77 tokens"
        self.inputs = torch.randn(batch, 4, 64, 64), torch.full((batch,), 500), torch.randn(batch, 77, 768)

    def make_ours(self) -> nn.Module:
        """minidiff's."""
        return UNet2DConditionModel(**UNET)

    def make_theirs(self) -> nn.Module:
        """diffusers'."""
        import diffusers

        return diffusers.UNet2DConditionModel(**UNET)

    def ask(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The noise."""
        return model(*inputs, return_dict=False)[:1]


class Decoder(Forward):
    """From latents to a picture."""

    title, rounds = "SD's VAE decoder, 4 x 64 x 64 to 3 x 512 x 512", 3
    # channels last, where torch's GroupNorm is less exact: 5e-5 from what diffusers itself answers without
    loose = (*Forward.loose, "diffusers, tuned", "diffusers, compiled")

    def __init__(self, name: str, folder: Path, *rest, **options):
        super().__init__(name, folder, *rest, **options)
        self.inputs = (torch.randn(1, 4, 64, 64),)

    def make_ours(self) -> nn.Module:
        """minidiff's, the encoder too."""
        return AutoencoderKL(**VAE)

    def make_theirs(self) -> nn.Module:
        """diffusers', the encoder too."""
        import diffusers

        return diffusers.AutoencoderKL(**VAE)

    def ask(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The picture."""
        return model.decode(*inputs, return_dict=False)[:1]


class Clip(Forward):
    """Embeddings of pictures and texts."""

    library, meta = "transformers", False           # its position_ids are in no state dict

    def __init__(self, name: str, folder: Path, *rest, batch: int = 1, **options):
        super().__init__(name, folder, *rest, **options)
        self.title = f"CLIP B/32, {batch} {'picture and text' if batch == 1 else 'pictures and texts'}"
        self.rounds = 9 if batch == 1 else 5
        ids = torch.randint(49000, (batch, 77))
        ids[:, -1] = 49407                          # the end of text, where the embedding is read
        self.inputs = ids, torch.randn(batch, 3, 224, 224)

    @property
    def engines(self) -> tuple[str, ...]:
        """open_clip's too. There is nothing to tune but by compiling."""
        return *(name for name in super().engines if "tuned" not in name), "open_clip"

    def make_ours(self) -> nn.Module:
        """miniclip's."""
        return CLIPModel(CLIPConfig())

    def make_theirs(self) -> nn.Module:
        """transformers'."""
        import transformers

        return transformers.CLIPModel(transformers.CLIPConfig())

    def tuned(self) -> nn.Module:
        """As it comes: it chooses the fused attention itself."""
        return self.filled(self.make_theirs)

    def ask(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The two embeddings, normalized."""
        out = model(*inputs)
        return out.image_embeds, out.text_embeds

    def build(self, name: str) -> Program:
        """open_clip takes pictures first."""
        if name != "open_clip":
            return super().build(name)
        model = self.open_clip()
        ids, pictures = self.inputs
        return lambda: model(pictures, ids)[:2]

    def open_clip(self) -> nn.Module:
        """Its ViT-B-32 with the row's weights."""
        import open_clip

        model = open_clip.create_model("ViT-B-32-quickgelu")
        if not self.alone:
            model.load_state_dict(convert.to_openai(self.weights()))
        return model.eval()
