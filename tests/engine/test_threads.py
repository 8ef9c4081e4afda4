"""PyTorch's threads in a step: one while the C core's workers decode, all else untouched."""

import pytest
import torch
from torch import nn

from turbomoe.engine.threads import one_torch_thread, uses_workers


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_and_back_even_after_an_error():
    with one_torch_thread(True):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError), one_torch_thread(True):
        raise ValueError
    assert torch.get_num_threads() == 2
    with one_torch_thread(False):
        assert torch.get_num_threads() == 2


def test_models_without_packed_layers_keep_their_threads():
    assert not uses_workers(nn.Sequential(nn.Linear(2, 2)))
