"""optimize(model): the same answers sooner, for inference on a CPU in float32.

Read last; nothing else needs it. Papers: Lavin 2016 (Winograd's minimal filtering, F(2x2, 3x3)).
No upstream. `optimize` gives layers a faster forward and leaves all else of them as it was: it changes their
class. Objects, keys, tensors, hooks and order are the model's own; only copies of weights are added. Where
the faster forward does not apply (gradients, another device or dtype, autocast, compilation, a torch without
the operators) the layer runs its plain one.

What was measured on one core with AVX2, and made the rules below:
- oneDNN, which computes torch's convolutions, reorders the weights at each call. Reordered once: 1280 -> 1280
  channels at 8 x 8 runs 2.3 times as fast, at 64 x 64 as before. It works on channels last without copies:
  the demo's UNet has convolutions twice as fast. Linear layers run 1.3 times as fast as convolutions 1 x 1,
  and 1.1 times by oneDNN's own linear operator.
- F(2x2, 3x3) makes a 2 x 2 square of results with 16 multiplications where the definition takes 36. The sums
  around them cost more than that saves below a harmonic mean of 300 channels, and with less than 32 squares
  reading the transformed weights (16/9 of the memory) does. Else 1.3 to 1.9 times as fast. F(4x4, 3x3) would
  save more, but is ten times less exact.
- Behind a nearest-neighbour doubling 7 of the 16 products are zero, and the large map is never made.
- The text is the same at each step, so are its keys and values.
- One product for q, k and v was as fast as three of packed weights: left alone. So is the thread count.
Shapes: B batch, C and K channels in and out, H W height and width, h w squares of 2 x 2 down and across,
t terms an axis (4, or 3 behind a doubling), n squares at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.attention import BasicTransformerBlock
from minidiff.resnet import Upsample2D

CHANNELS = 150      # C K / (C + K), half a harmonic mean: from here on Winograd's sums are the lesser part
CHANNELS_DOUBLED = 32                   # the same behind a doubling
SQUARES = 32        # and from so many squares on the products are worth reading the weights
BAND = 512          # squares at a time: the sums then stay in the cache
ROWS, WORK = 16, 2**22  # of a linear layer's input; its multiplications: less does not repay the detour
DEEP = 4096         # channels into a linear layer: oneDNN's convolutions 1 x 1 of more are slow
LARGE = 2**16       # numbers in a group: error 4e-7
ENDS = ("conv_out", "quant_conv", "post_quant_conv")    # their maps are users', in the usual memory format

Model = TypeVar("Model", bound=nn.Module)


def optimize(model: Model, winograd: bool = True) -> Model:
    """Makes a model faster for inference, in place, and returns it: UNet2DConditionModel, AutoencoderKL, the
    CLIP models, TextToImage, or any other with convolutions and linear layers.

    Same interface and state dict; results differ by rounding (below 1e-5 relative). Load weights, move, copy,
    save and train it as before: copies of weights are made at the first call without gradients, and anew
    after a change. A change through `.data` goes unseen: call optimize again. So after layers were replaced
    (LoRA taken out). winograd: False takes less memory (the copies: 1 instead of up to 16/9 of the weights).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize takes a model, not {type(model).__name__}: of a pipeline, its parts")
    packs, text = operators_work(), Text()
    for name, module in model.named_modules():
        module.__class__ = FASTER.get(type(module), type(module))
        if isinstance(module, Faster):
            module.forget()
            module.packs, module.winograd, module.ends = packs, winograd, name.rpartition(".")[2] in ENDS
    for block in [m for m in model.modules() if isinstance(m, BasicTransformerBlock)]:
        for attention in [block.attn2, *[block.attn1] * block.only_cross_attention]:
            for project in (attention.to_k, attention.to_v):
                if type(project) in (PackedLinear, TextLinear):
                    project.__class__, project.text = TextLinear, text
    return model


def operators_work() -> bool:
    """Whether this torch packs weights for this CPU; tried out, since it promises neither operator."""
    x, weight = torch.ones(1, 16, 4, 4), torch.ones(16, 16, 3, 3)
    try:
        y = run(x, pack(weight, (1, 1), (1, 1), x), None, (1, 1), (1, 1))
    except (AttributeError, RuntimeError, TypeError):       # absent, not for this CPU, called otherwise
        return False
    return torch.equal(y, F.conv2d(x, weight, padding=1))


def pack(weight: Tensor, padding: tuple, stride: tuple, x: Tensor) -> Tensor:
    """Weights [K, C, k, k] in oneDNN's order for inputs like x [B, C, H, W]."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, stride, (1, 1), 1,
                                                     list(x.shape))


def run(x: Tensor, packed: Tensor, bias: Tensor | None, padding: tuple, stride: tuple) -> Tensor:
    """x [B, C, H, W] -> [B, K, ...], channels last."""
    return torch.ops.mkldnn._convolution_pointwise(x.contiguous(memory_format=torch.channels_last), packed,
                                                   bias, padding, stride, (1, 1), 1, "none", [], "")


# ----------------------------------------------------------------------------------------------------- layers


class Faster(nn.Module):
    """Base of the faster layers: when they may be, and copies that are as old as what they were made of."""

    packs, winograd, ends = False, True, False
    made: dict[str, tuple]

    def may(self, x: Tensor) -> bool:
        """Whether the faster forward computes what the plain one would, of this input."""
        tensors = [x, *self._parameters.values()]
        if (all(t is None or (t.is_cpu and t.dtype == torch.float32) for t in tensors)
                and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
                and type(x) is Tensor and x.numel() > 0 and not self._parameters["weight"].is_inference()
                and torch.backends.mkldnn.enabled and not torch.is_autocast_enabled("cpu")
                and not torch.compiler.is_compiling() and not torch.jit.is_tracing()):
            return True
        self.forget()
        return False

    def once(self, name: str, make: Callable[[Tensor], Any]) -> Any:
        """make(weight), remembered until the weight is another tensor or another was written into it.

        A view of the weight is kept as well, so that no other tensor can come to lie at its address.
        """
        weight = self.weight
        stamp = weight.data_ptr(), weight._version
        found = self.made.get(name)
        if found is None or found[0] is not weight or found[1] != stamp:
            found = self.made[name] = (weight, stamp, weight.detach(), make(weight.detach()))
        return found[3]

    def forget(self) -> None:
        """Drops the copies."""
        self.made = {}

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        self.forget()               # .to, .double, .cuda: not both, the copies and the moved weights
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": {}}        # copy.deepcopy and pickle: packed weights are opaque


class PackedConv2d(Faster, nn.Conv2d):
    """A convolution 1 x 1 or 3 x 3 by Winograd's sums, or with weights in oneDNN's order."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, K, ...], channels last in memory but at the ENDS."""
        known = (self.kernel_size in ((1, 1), (3, 3)) and self.dilation == (1, 1) and self.groups == 1
                 and self.padding_mode == "zeros" and isinstance(self.padding, tuple)
                 and x.ndim == 4 and x.shape[1] == self.in_channels)
        if not known or not self.may(x):
            return super().forward(x)
        if self.sums_pay(len(x) * ((x.shape[2] + 1) // 2) * ((x.shape[3] + 1) // 2), CHANNELS):
            y = winograd(x, self.once("winograd", transform), self.bias)
        elif self.packs:
            packed = self.once("packed", lambda weight: pack(weight, self.padding, self.stride, x))
            y = run(x, packed, self.bias, self.padding, self.stride)
        else:
            return super().forward(x)
        return y.contiguous() if self.ends else y

    def sums_pay(self, squares: int, channels: int) -> bool:
        """Whether Winograd applies, and pays for so many squares of results."""
        C, K = self.in_channels, self.out_channels
        return (self.winograd and self.kernel_size == (3, 3) and self.stride == self.padding == (1, 1)
                and C * K / (C + K) >= channels and squares >= SQUARES)


class SparseUpsample2D(Upsample2D):
    """A doubling and its convolution at once; any other size as before."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """As Upsample2D: [B, C, H, W] -> [B, C, *size]."""
        B, C, H, W = x.shape
        conv = self.conv
        if (tuple(size or (2 * H, 2 * W)) == (2 * H, 2 * W) and type(conv) is PackedConv2d
                and C == conv.in_channels and conv.sums_pay(B * H * W, CHANNELS_DOUBLED)
                and not hooked(conv) and conv.may(x)):
            return winograd(x, conv.once("doubled", lambda weight: transform(weight, True)), conv.bias, True)
        return super().forward(x, size)


class PackedLinear(Faster, nn.Linear):
    """A linear layer as what it is as well: a convolution 1 x 1 of a map that is one column."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., K]."""
        rows, (K, C) = x.shape[:-1].numel(), self.weight.shape
        pays = rows >= ROWS and rows * C * K >= WORK and C <= DEEP
        if not self.packs or not pays or x.shape[-1] != C or not self.may(x):
            return super().forward(x)
        column = x.reshape(1, rows, 1, C).permute(0, 3, 1, 2)                   # [1, C, rows, 1], no copy
        packed = self.once("packed", lambda w: pack(w[:, :, None, None], (0, 0), (1, 1), column))
        return run(column, packed, self.bias, (0, 0), (1, 1)).permute(0, 2, 3, 1).view(*x.shape[:-1], K)


class ExactGroupNorm(Faster, nn.GroupNorm):
    """Large maps with channels last: torch adds up each group's numbers one after the other in float32, and
    is off by 5e-5 at a million. In the usual memory format it does not, but the way there is slow."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        large = x.shape[1:].numel() > LARGE * self.num_groups
        if not large or x.is_contiguous() or x.ndim != 4 or not self.affine or not self.may(x):
            return super().forward(x)
        mean = self.mean(x.split(16, dim=2))                                    # [B, C, 1, 1], float64
        var = self.mean((rows - mean.float()).square_() for rows in x.split(16, dim=2))
        scale = (var + self.eps).rsqrt() * self.weight[:, None, None]
        shift = self.bias[:, None, None] - mean * scale
        return torch.addcmul(shift.float(), x, scale.float())

    def mean(self, bands: Iterable[Tensor]) -> Tensor:
        """Of each group, repeated for its channels, of maps that come as bands [B, C, h, W]."""
        bands = [(rows.shape[2], rows.mean((2, 3), keepdim=True).double()) for rows in bands]
        channels = sum(h * mean for h, mean in bands) / sum(h for h, _ in bands)
        groups = channels.unflatten(1, (self.num_groups, -1))
        return groups.mean(2, keepdim=True).expand_as(groups).flatten(1, 2)


class Text:
    """The text that a model was last given: one copy for all its layers."""

    known: Tensor | None = None

    def same(self, x: Tensor) -> Tensor:
        """A tensor that stays the same object as long as x has the same values, whatever object x is and
        whoever wrote into it."""
        known = self.known
        if (known is None or (known.shape, known.dtype, known.device) != (x.shape, x.dtype, x.device)
                or not torch.equal(known, x)):
            known = self.known = x.detach().clone()
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {"known": None}                      # nobody's words go into a file


class TextLinear(PackedLinear):
    """Keys or values of a text: computed when the text or the weight changed."""

    text: Text

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, K], not to be written into."""
        if self.bias is not None or not self.may(x):
            return super().forward(x)
        known, answers = self.text.same(x), self.once("answers", lambda _: {})
        last = answers.get("last")
        if last is None or last[0] is not known:
            last = answers["last"] = known, super().forward(x)
        return last[1]


FASTER = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear, Upsample2D: SparseUpsample2D,
          nn.GroupNorm: ExactGroupNorm}


def hooked(module: nn.Module) -> bool:
    """Whether somebody waits for this module's forward to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


# --------------------------------------------------------------------------------------------------- Winograd


def transform(weight: Tensor, doubled: bool = False) -> Tensor:
    """[K, C, 3, 3] -> [t * t, C, K]: G g G' of Lavin 2016, eq. 8; doubled: of its terms that are not zero."""
    G = [[1.0, 1.0, 1.0]] if doubled else [[0.5, 0.5, 0.5], [0.5, -0.5, 0.5]]
    G = weight.new_tensor([[1.0, 0.0, 0.0], *G, [0.0, 0.0, 1.0]])
    return torch.einsum("si,ocij,tj->stco", G, weight, G).flatten(0, 1).contiguous()


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool = False) -> Tensor:
    """A 3 x 3 convolution of x [B, C, H, W], or of x doubled by nearest neighbours, with what `transform`
    made of its weights: [B, K, H, W], or [B, K, 2H, 2W]. Channels last; in bands of about BAND squares."""
    B, C, H, W = x.shape
    h, w = (H, W) if doubled else ((H + 1) // 2, (W + 1) // 2)
    odd = (0, 0) if doubled else (2 * w - W, 2 * h - H)
    x = x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    x = F.pad(x, (0, 0, 1, 1 + odd[0], 1, 1 + odd[1]))      # [B, H + 2, W + 2, C]
    y = x.new_empty(B, 2 * h, 2 * w, weight.shape[-1])
    images, rows, step = max(1, BAND // (h * w)), max(1, BAND // w), 1 if doubled else 2
    for b in range(0, B, images):
        for r in range(0, h, rows):
            band = x[b : b + images, step * r : step * (r + rows) + 2]
            squares(band, weight, bias, y[b : b + images, 2 * r : 2 * (r + rows)], doubled)
    y = y if doubled else y[:, :H, :W]
    return y.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # copies odd sizes only


def squares(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, doubled: bool) -> None:
    """A' [(G g G') (B' d B)] A of Lavin 2016, eq. 8: padded x [B, H, W, C] -> y [B, 2h, 2w, K], written."""
    B, h, w = y.shape[0], y.shape[1] // 2, y.shape[2] // 2
    t, C = 3 if doubled else 4, x.shape[-1]
    tall = terms(x, 1, x.new_empty(t, B, h, x.shape[2], C))
    both = terms(tall, 3, x.new_empty(t, t, B, h, w, C).transpose(0, 1))        # [t across, t down, ...]
    both = both.transpose(0, 1).reshape(t * t, B * h * w, C)                    # [t * t, n, C]
    products = torch.bmm(both, weight).view(t, t, B, h, w, -1)
    for i, row in enumerate(results(products)):                                 # [t, B, h, w, K]
        for j, result in enumerate(results(row)):
            if bias is not None:
                result += bias
            y[:, i::2, j::2] = result


def terms(d: Tensor, axis: int, out: Tensor) -> Tensor:
    """B' d along an axis, for all squares: d0 - d2, d1 + d2, d2 - d1, d1 - d3 -> out [t, ...].

    Doubled, d1 and d2 are one pixel: the third term is zero, and the weights hold the second one's 2.
    """
    doubled = len(out) == 3
    d = d.unfold(axis, 3, 1).unbind(-1) if doubled else d.unfold(axis, 4, 2).unbind(-1)
    torch.sub(d[0], d[1] if doubled else d[2], out=out[0])
    torch.sub(d[1], d[-1], out=out[-1])
    if doubled:
        out[1].copy_(d[1])
    else:
        torch.add(d[1], d[2], out=out[1])
        torch.sub(d[2], d[1], out=out[2])
    return out


def results(m: Tensor) -> tuple[Tensor, Tensor]:
    """A' m: m0 + m1 + m2 and m1 - m2 - m3, or m0 + m1 and m1 - m2 behind a doubling; written into m."""
    m[0].add_(m[1])
    if len(m) == 4:
        m[0].add_(m[2])
        m[1].sub_(m[2])
    return m[0], m[1].sub_(m[-1])
