"""After each test of the battery nothing may be left in diffusers' registry or processors."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _registry_is_left_alone() -> Iterator[None]:
    before = dict(_AttentionBackendRegistry._backends)
    yield
    if before != _AttentionBackendRegistry._backends or attention_processor.F is not torch.nn.functional:
        gc.collect()  # models that a test dropped while they were controlled
    assert before == _AttentionBackendRegistry._backends
    assert attention_processor.F is torch.nn.functional
