"""What controls cost a model that they leave alone: a whole forward with idle controls against one without."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .attach import attach, parts_of
from .controls import Isolate, Regions
from .errors import UnsupportedModelError
from .execute.bench import interleaved
from .families import family_of

__all__ = ["bench_idle"]


def bench_idle(pipe: Any, repeats: int = 31, seed: int = 0) -> dict[str, Any]:
    """Time forwards of a FLUX pipeline's transformer without controls, and of a copy with idle ones attached.

    Args:
        pipe: whose transformer is measured, at a quarter of a megapixel's tokens (1024).
        repeats: rounds of the interleaved loop, after one round to warm up.
        seed: of the inputs; the global generator is not touched.

    Returns:
        {"suite": "idle", "rows": [...]}; a row holds case, tokens, idle_s, vanilla_s (seconds, medians), ratio, and
        whether the outputs are bit-equal.

    Raises:
        UnsupportedModelError: for another family, whose inputs are not made here.
    """
    model: Any = parts_of(pipe)[0]
    if family_of(model).name != "flux":
        raise UnsupportedModelError(
            f"bench idle makes inputs for FLUX.1 transformers; found {type(model).__name__}. Name toy-flux or a FLUX.1 "
            "model."
        )
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    inputs = {
        "hidden_states": normal(1, len(grid), model.config.in_channels),
        "encoder_hidden_states": normal(1, 40, model.config.joint_attention_dim),
        "pooled_projections": normal(1, model.config.pooled_projection_dim),
        "timestep": torch.full((1,), 0.5, device=model.device, dtype=model.dtype),
        "img_ids": grid.to(model.device, model.dtype),
        "txt_ids": torch.zeros(40, 3, device=model.device, dtype=model.dtype),
        "return_dict": False,
    }
    other = copy.deepcopy(model)
    with attach(other, [Isolate(strength=0.0), Regions([])]), torch.inference_mode():
        equal = torch.equal(model(**inputs)[0], other(**inputs)[0])
        seconds = interleaved({"vanilla": lambda: model(**inputs), "idle": lambda: other(**inputs)}, repeats)
    row = {
        "case": "attached, idle",
        "tokens": len(grid) + 40,
        "idle_s": seconds["idle"],
        "vanilla_s": seconds["vanilla"],
        "ratio": seconds["idle"] / seconds["vanilla"],
        "bit_equal": equal,
    }
    return {"suite": "idle", "rows": [row]}
