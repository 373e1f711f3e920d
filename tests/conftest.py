"""One thread: tests on tiny tensors run several times faster so."""

import torch

torch.set_num_threads(1)
