"""Settings and fixtures shared by all tests."""

import os

# Of these small tensors two threads make slow work, beside other processes most of all.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# Machines are noisy: how long an example takes is no property of the code.
hypothesis.settings.register_profile(
    "free-adv",
    parent=hypothesis.settings(),
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("free-adv")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
