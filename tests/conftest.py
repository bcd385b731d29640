"""Every test starts from the same random state and uses one thread."""

import os

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def same_random_state():
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # the entrances switch it on; hypothesis wants it off
