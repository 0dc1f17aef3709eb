"""After each test of the battery nothing may be left in diffusers' registry."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from diffusers.models.attention_dispatch import _AttentionBackendRegistry


@pytest.fixture(autouse=True)
def _registry_is_left_alone() -> Iterator[None]:
    before = dict(_AttentionBackendRegistry._backends)
    yield
    if before != _AttentionBackendRegistry._backends:
        gc.collect()  # models that a test dropped while they were controlled
    assert before == _AttentionBackendRegistry._backends
