import torch


def denoise(x_t: torch.Tensor, pictures: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    rows = pictures.flatten(1)
    distance = torch.cdist(x_t.flatten(1), alpha * rows).square()
    weights = torch.softmax(-distance / (2 * sigma**2), dim=1)
    return (weights @ rows).reshape(x_t.shape)
