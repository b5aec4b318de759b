"""Settings that all tests of loha_core share."""

from __future__ import annotations

import os

# Before anything imports Triton: its kernels then run on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

# The machines that run this have few cores and other work: no deadline per example, and the same examples on CI.
settings.register_profile("core", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("core"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "core")

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def one_thread():
    """Models this small only lose time to a second thread, and much of it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
