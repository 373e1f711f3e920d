"""One thread: tests on tiny tensors run several times faster so, and forked processes need no pool."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Also after a test of a script that was given --threads 2."""
    torch.set_num_threads(1)
