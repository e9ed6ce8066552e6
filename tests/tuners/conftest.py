"""Every test here sees GAIN registered with PEFT, as `import gaintune` leaves it, and the same seed."""

import pytest
import torch

import gaintune  # noqa: F401


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
