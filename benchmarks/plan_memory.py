"""Memory of plans for FLUX.1 at full size, on the meta device: `python benchmarks/plan_memory.py`.

A dense mask of T tokens takes T^2 bytes, and the additive one in bfloat16 that kernels are given 2 T^2 more. The
published code of AlignedGen makes one of [B, heads, T + N, T + 2 N] in every layer that shares.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from itertools import product
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch.utils._python_dispatch import TorchDispatchMode

import attnctrl as ac
from attnctrl.act import Act
from attnctrl.call import Row
from attnctrl.families.flux import FLUX
from attnctrl.layout import Measures
from attnctrl.schedule import Moment
from attnctrl.stack import Stack
from attnctrl.versions import versions

Box = tuple[float, float, float, float]

HALVES: list[Box] = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
QUADRANTS: list[Box] = [(x / 2, y / 2, (x + 1) / 2, (y + 1) / 2) for y, x in product(range(2), range(2))]
CASES: dict[str, tuple[list[Box], tuple[int, int]]] = {
    "two halves, references of 512 x 512": (HALVES, (32, 32)),
    "four quadrants, references of 512 x 512": (QUADRANTS, (32, 32)),
    "four quadrants, references of 1024 x 1024": (QUADRANTS, (64, 64)),
}


def measure() -> list[dict[str, Any]]:
    """A row for each case and phase: tokens, density, classes, executor, bytes of the plan and of dense masks."""
    with torch.device("meta"):
        model = FluxTransformer2DModel()
    rows = []
    for name, (boxes, reference) in CASES.items():
        regions = [ac.Region(f"entity {i}", box=box, reference=i) for i, box in enumerate(boxes)]
        stack = [ac.GroupIsolation(regions), ac.RegionModulation(window=(0.0, 0.1))]
        found = ac.explain(
            model, stack, width=1024, height=1024, steps=20, region_tokens=16, references=[reference] * len(boxes)
        )
        for phase, label in zip(found.scenes[0], "AB", strict=True):
            tokens = sum(phase["tokens"].values())
            (plan,) = phase["plans"]
            rows.append(
                {
                    "case": f"{name}, phase {label}",
                    "tokens": tokens,
                    **{key: plan[key] for key in ("density", "classes", "executor")},
                    "plan_bytes": plan["bytes"],
                    "mask_bytes": tokens**2,
                    "bias_bytes": 2 * tokens**2,
                }
            )
    return rows


class Peak(TorchDispatchMode):
    """The most bytes that tensors made meanwhile have held at one time, told apart by their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self._tensors: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and not any(tensor is one for one in args):
                self._hold(tensor, {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)})
        return out

    def _hold(self, tensor: torch.Tensor, given: set[int]) -> None:
        storage, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if storage in given and storage not in self._tensors:
            return  # a view of what was there before
        self.now += 0 if self._tensors[storage] else size
        self._tensors[storage] += 1
        self.bytes = max(self.bytes, self.now)
        weakref.finalize(tensor, self._drop, storage, size)

    def _drop(self, storage: int, size: int) -> None:
        self._tensors[storage] -= 1
        if not self._tensors[storage]:
            del self._tensors[storage]
            self.now -= size


STYLES: dict[str, dict[str, Any]] = {
    "alignedgen": {},
    "alignedgen without AdaIN": {"match": ()},
}
PICTURES, TEXT, GRID, HEADS, DEPTH = 4, 512, (64, 64), 24, 128


def measure_sharing() -> list[dict[str, Any]]:
    """A row for each style: what one layer of a set of four at 1024 x 1024 holds, in bytes.

    `plan_bytes` between calls; `peak_bytes` while it attends in bfloat16, beyond queries, keys, values and the output
    of the model's own call; `mask_bytes` of the published code, `joined_bytes` of the keys and values that it joins.
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel()
    image = GRID[0] * GRID[1]
    tokens, states = TEXT + image, HEADS * DEPTH * 2
    rows = []
    for name, options in STYLES.items():
        act = sharing_act(model, options)
        query, key, value = (
            torch.empty(PICTURES, HEADS, tokens, DEPTH, dtype=torch.bfloat16, device="meta") for _ in range(3)
        )
        with torch.no_grad(), Peak() as peak:
            out = act.run(query, key, value, None, lambda q, k, v, mask=None, scale=None: torch.empty_like(q), None)
        rows.append(
            {
                "case": f"{name}, four pictures of 1024 x 1024",
                "executors": list(act.executors),
                "plan_bytes": sum(plan.nbytes for _, plan in act.parts if plan is not None),
                "peak_bytes": peak.bytes - out.nbytes,
                "mask_bytes": 2 * PICTURES * HEADS * tokens * (tokens + image),
                "joined_bytes": 2 * PICTURES * (tokens + image) * states,
            }
        )
    return rows


def sharing_act(model: Any, options: dict[str, Any]) -> Act:
    """What the last layer does for a set of pictures of which the first is the anchor."""
    stack = Stack(ac.preset("alignedgen", **options), FLUX.layers(model), FLUX.presets, FLUX.standing(model))
    lines = [stack.line(Row("cond", 0, n), (0,), PICTURES, Moment()) for n in range(PICTURES)]
    variants, _ = stack.variants([FLUX.arrange(model, Measures(TEXT, GRID))], lines, lambda region: 0)
    acts = stack.acts(variants, torch.device("meta"), (None,))
    return acts[FLUX.layers(model)[-1].name][0]


if __name__ == "__main__":
    told = {"suite": "plan-memory", "rows": measure(), "sharing": measure_sharing(), "versions": versions()}
    sys.stdout.write(json.dumps(told, indent=2) + "\n")
