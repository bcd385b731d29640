"""Every test starts from the same random state and uses one thread."""

import os

# Before torch is imported, and for the commands that tests start: two workers, two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def same_random_state():
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # the entrances switch it on; hypothesis wants it off
