"""Against causal_bias of the text tower, and through a softmax."""

import torch

from miniclip.model import causal_bias


def check(answer) -> None:
    """Padding on the right and on the left, in two dtypes."""
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    for dtype in (torch.float32, torch.float16):
        wanted = causal_bias(4, mask, dtype, mask.device)
        found = answer.causal_bias(4, mask, dtype)
        assert isinstance(found, torch.Tensor), f"the bias is a {type(found).__name__}, not a tensor"
        assert found.shape == wanted.shape, f"its shape is {list(found.shape)}, not {list(wanted.shape)}"
        assert found.dtype == dtype, f"the bias is {found.dtype}, not {dtype}"
        assert not found.float().softmax(-1).isnan().any(), "a row that may look at nothing becomes NaN"
        if not found.equal(wanted):
            b, _, i, j = (found != wanted).nonzero()[0].tolist()
            may = "may" if wanted[b, 0, i, j] == 0 else "may not"
            raise AssertionError(f"with mask {mask[b].tolist()} token {i} {may} look at token {j}, "
                                 f"but the bias is {found[b, 0, i, j]:g}")
