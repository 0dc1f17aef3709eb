"""After each test of the battery nothing may be left in diffusers' registry or processors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many cases the battery held: tests of every control, family and door, and all that stand in this folder."""
    ran = [one for kind in ("passed", "failed", "error") for one in terminalreporter.stats.get(kind, ())]
    here = [one.nodeid for one in ran if getattr(one, "when", "") == "call" and "tests/battery/" in one.nodeid]
    if here:
        core = sum("test_battery.py" in one for one in here)
        terminalreporter.write_line(
            f"battery: {len(here)} cases, {core} of them every control x every family x both doors"
        )


@pytest.fixture(autouse=True)
def _registry_is_left_alone() -> Iterator[None]:
    if any(hasattr(function, "_attnctrl_original") for function in _AttentionBackendRegistry._backends.values()):
        gc.collect()  # what tests of other folders dropped
    before = dict(_AttentionBackendRegistry._backends)
    yield
    if before != _AttentionBackendRegistry._backends or attention_processor.F is not torch.nn.functional:
        gc.collect()  # models that a test dropped while they were controlled
    assert before == _AttentionBackendRegistry._backends
    assert attention_processor.F is torch.nn.functional
