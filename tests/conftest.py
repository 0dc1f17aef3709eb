"""Shared by all tests: this folder on the import path (for `tiny`), and one thread, as tiny tensors only wait for further ones."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
