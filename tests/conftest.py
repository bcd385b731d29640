"""Every test imports from the repository root, starts from the same random state, and uses one thread."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True)
def same_random_state():
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # the entrances switch it on for speed; hypothesis wants true floating point
