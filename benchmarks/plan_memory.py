"""Memory of plans for FLUX.1 at full size, on the meta device: `python benchmarks/plan_memory.py`.

A dense mask of T tokens takes T^2 bytes, and the additive one in bfloat16 that kernels are given 2 T^2 more.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

import attnctrl as ac
from attnctrl.provenance import versions

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


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"suite": "plan-memory", "rows": measure(), "versions": versions()}, indent=2) + "\n")
