import torch


def mend(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mended = {}
    for name, tensor in tensors.items():
        if name.endswith("position_ids"):
            continue                                        # 0, 1, 2, ...: nothing was learned
        if name.endswith("position_embedding.weight"):
            tensor = tensor[0]
        mended[name.replace("pre_layernorm", "pre_layrnorm")] = tensor
    return mended
