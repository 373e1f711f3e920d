"""ResNet picture towers: OpenAI's ModifiedResNet (RN50 to RN50x64) with its CLIP, and the plain ResNet-50.

Read after model.py; SimpleCLIPModel in simple.py uses the plain one.
Papers: He et al. 2016 (ResNet); Radford et al. 2021, section 2.4 and appendix (the changes OpenAI made).
Mirrors: clip/model.py of OpenAI (keys visual.*); torchvision's resnet50 (its keys without fc.*, as timm's
too).
Shapes: B batch, C channels, H W height and width, w width of the stem, E shared width, nh heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.config import CLIPResNetConfig
from miniclip.model import (
    BaseModelOutputWithPooling,
    CLIPOutput,
    CLIPPreTrainedModel,
    CLIPTextTransformer,
    Features,
    attention_fused,
    clip_loss,
    draw,
    features_of,
    normalize,
    projection,
)


def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias (batch norm follows), padded so that stride 1 keeps the size."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)


# ------------------------------------------------------------------------------------------- the plain ResNet


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up to 4 times the planes, plus the input.
    The stride sits on the 3x3 (ResNet v1.5)."""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv(in_channels, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Sequential()                                     # no keys when empty
        if stride > 1 or in_channels != 4 * planes:
            self.downsample = nn.Sequential(conv(in_channels, 4 * planes, 1, stride),
                                            nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4 planes, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        # [B, planes, H/stride, W/stride]
        y = F.relu(self.bn2(self.conv2(y)))
        # [B, 4 planes, H/stride, W/stride]
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


def stage(block: type, in_channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` bottlenecks, of which the first one strides."""
    first = block(in_channels, planes, stride)
    return nn.Sequential(first, *(block(4 * planes, planes, 1) for _ in range(blocks - 1)))


class ResNet(nn.Module):
    """Pictures [B, 3, H, W] -> [B, 2048], the mean of the last feature map.
    Keys: torchvision's resnet50 but fc.*.

    layers: (3, 4, 6, 3) is ResNet-50. Expects ImageNet's normalisation if it carries ImageNet's weights.
    """

    def __init__(self, layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64):
        super().__init__()
        self.conv1, self.bn1 = conv(3, width, 7, 2), nn.BatchNorm2d(width)
        self.layer1 = stage(Bottleneck, width, width, layers[0], 1)
        self.layer2 = stage(Bottleneck, 4 * width, 2 * width, layers[1], 2)
        self.layer3 = stage(Bottleneck, 8 * width, 4 * width, layers[2], 2)
        self.layer4 = stage(Bottleneck, 16 * width, 8 * width, layers[3], 2)
        self.features = 32 * width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):                                 # He 2015, as torchvision has it
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 32 w]; any H and W."""
        x = F.relu(self.bn1(self.conv1(x)))                                   # [B, w, H/2, W/2]
        x = F.max_pool2d(x, 3, stride=2, padding=1)                           # [B, w, H/4, W/4]
        x = self.layer2(self.layer1(x))                                       # [B, 8 w, H/8, W/8]
        x = self.layer4(self.layer3(x))                                       # [B, 32 w, H/32, W/32]
        return x.mean(dim=(2, 3))                                             # [B, 32 w]


# ------------------------------------------------------------------------------------ OpenAI's ModifiedResNet


class ModifiedBottleneck(nn.Module):
    """All convolutions have stride 1; average pooling shrinks instead, on both branches, against aliasing."""

    def __init__(self, in_channels: int, planes: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = conv(in_channels, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = conv(planes, 4 * planes, 1), nn.BatchNorm2d(4 * planes)
        self.downsample = nn.Sequential()
        # upstream's pooling has no key: "-1"
        if stride > 1 or in_channels != 4 * planes:
            self.downsample = nn.Sequential(conv(in_channels, 4 * planes, 1), nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 4 planes, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))                                   # [B, planes, H, W]
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        # [B, 4 planes, H/stride, W/stride]
        y = self.bn3(self.conv3(y))
        return F.relu(y + self.downsample(x))


class AttentionPool2d(nn.Module):
    """One attention step whose only query is the mean of all places: [B, C, H, W] -> [B, E]."""

    def __init__(self, side: int, C: int, num_heads: int, E: int):
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, C) / C**0.5)
        self.k_proj, self.q_proj, self.v_proj = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.c_proj = nn.Linear(C, E)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] with H = W = side -> [B, E]."""
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)      # [B, nh, T, hd]

        x = x.flatten(2).transpose(1, 2)                                      # [B, HW, C]
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)                # [B, HW + 1, C]
        x = x + self.positional_embedding
        q, k, v = heads(self.q_proj(x[:, 0])[:, None]), heads(self.k_proj(x)), heads(self.v_proj(x))
        y = attention_fused(q, k, v, None, False, 0.0)                        # [B, nh, 1, hd]
        return self.c_proj(y.flatten(1))                                      # [B, E]


class ModifiedResNet(nn.Module):
    """Pictures [B, 3, n, n] -> [B, E]: a stem of three convolutions, four stages, attention pooling."""

    def __init__(self, layers: tuple[int, ...], E: int, num_heads: int, image_size: int, width: int):
        super().__init__()
        w = width
        self.image_size = image_size
        self.conv1, self.bn1 = conv(3, w // 2, 3, 2), nn.BatchNorm2d(w // 2)
        self.conv2, self.bn2 = conv(w // 2, w // 2, 3), nn.BatchNorm2d(w // 2)
        self.conv3, self.bn3 = conv(w // 2, w, 3), nn.BatchNorm2d(w)
        self.layer1 = stage(ModifiedBottleneck, w, w, layers[0], 1)
        self.layer2 = stage(ModifiedBottleneck, 4 * w, 2 * w, layers[1], 2)
        self.layer3 = stage(ModifiedBottleneck, 8 * w, 4 * w, layers[2], 2)
        self.layer4 = stage(ModifiedBottleneck, 16 * w, 8 * w, layers[3], 2)
        self.attnpool = AttentionPool2d(image_size // 32, 32 * w, num_heads, E)
        self.init_weights()

    def init_weights(self) -> None:
        """As OpenAI: attention drawn with in^-0.5, and every block starts as the identity (bn3 scales by
        0)."""
        pool = self.attnpool
        for linear in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(linear.weight, std=pool.c_proj.in_features**-0.5)
        for name, p in self.named_parameters():
            if name.startswith("layer") and name.endswith("bn3.weight"):
                nn.init.zeros_(p)

    def feature_map(self, x: Tensor) -> Tensor:
        """[B, 3, n, n] -> [B, 32 w, n/32, n/32]."""
        if x.shape[2:] != (self.image_size, self.image_size):
            H, W = x.shape[2:]
            raise ValueError(f"Input image size ({H}*{W}) doesn't match model "
                             f"({self.image_size}*{self.image_size}).")
        x = x.to(self.conv1.weight.dtype)
        for layer, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(layer(x)))                                        # [B, w, n/2, n/2]
        x = F.avg_pool2d(x, 2)                                                # [B, w, n/4, n/4]
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, n, n] -> [B, E]. Raises ValueError for another size than image_size."""
        return self.attnpool(self.feature_map(x))


class CLIPResNetModel(CLIPPreTrainedModel):
    """OpenAI's RN50, RN101, RN50x4, RN50x16, RN50x64.
    CLIPModel's methods and outputs; pictures have no hidden states.

    Keys: the text tower and logit_scale as in CLIPModel, the picture tower as OpenAI's, visual.*.
    """

    config_class = CLIPResNetConfig
    model_type = "clip_resnet"

    def __init__(self, config: CLIPResNetConfig):
        super().__init__()
        self.config = config
        heads = config.vision_width * 32 // 64
        self.text_model = CLIPTextTransformer(config.text_config)
        self.visual = ModifiedResNet(
            config.vision_layers, config.projection_dim, heads, config.image_size, config.vision_width
        )
        self.text_projection = projection(config.text_config.hidden_size, config.projection_dim)
        draw(self, {self.text_projection.weight: config.text_config.hidden_size**-0.5})
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))

    def get_text_features(self, *args: Any, return_dict: bool | None = None,
                          **kwargs: Any) -> Features | tuple:
        """[B, E], not normalised; see CLIPModel.get_text_features."""
        out = self.text_model(*args, return_dict=True, **kwargs)
        return features_of(self.text_projection(out.pooler_output), out, return_dict is not False)

    def get_image_features(self, pixel_values: Tensor, return_dict: bool | None = None) -> Features | tuple:
        """[B, E], not normalised; last_hidden_state is the feature map [B, 32 w, n/32, n/32]."""
        out = self._vision(pixel_values)
        return features_of(out.pooler_output, out, return_dict is not False)

    def _vision(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        features = self.visual.feature_map(pixel_values)
        return BaseModelOutputWithPooling(features, self.visual.attnpool(features))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        return_dict: bool | None = None,
    ) -> CLIPOutput | tuple:
        """input_ids [Bt, S], pixel_values [Bi, 3, n, n] -> CLIPOutput, as CLIPModel."""
        text = self.text_model(input_ids, attention_mask, position_ids, return_dict=True)
        vision = self._vision(pixel_values)
        text.pooler_output = self.text_projection(text.pooler_output)         # [Bt, E]
        text_embeds, image_embeds = normalize(text.pooler_output), normalize(vision.pooler_output)
        logits_per_text = text_embeds @ image_embeds.T * self.logit_scale.exp()  # [Bt, Bi]
        loss = clip_loss(logits_per_text) if return_loss else None
        out = CLIPOutput(loss, logits_per_text.T, logits_per_text, text_embeds, image_embeds, text, vision)
        return out if return_dict is not False else out.to_tuple()
