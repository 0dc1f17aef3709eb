"""`attnctrl bench inversion`: how much of held-out renders comes back from noise, over the number of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from PIL import Image
from torch import nn

from attnctrl.attach import parts_of
from attnctrl.pipelines.runner import Counter

from .suites_model import held_out_renders

__all__ = ["bench_inversion"]

STEPS = (5, 10, 20, 40, 80, 160)


def bench_inversion(
    inverter: Any,
    pictures: int = 8,
    steps: Sequence[int] = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Invert renders with an empty prompt, draw them again by the same method, and compare.

    Args:
        inverter: of a toy model, `attnctrl.pipelines.inversion.Inverter`.
        pictures: number of renders, all in one batch.
        steps: each way; every number twice the one before, for `gain` to mean something.
        progress: called with (walks done, walks in all).

    Returns:
        {"suite": "inversion", "rows": [...], "vae_psnr": dB, ...}; a row holds method, steps and forwards (both ways),
        rms (root mean square error of the latents, median over the pictures), worst (the largest of them), gain (rms
        with half as many steps over this one, median of the pictures' own), psnr and least_psnr (median and smallest,
        of the pictures in dB).
    """
    from attnctrl.pipelines.inversion import InversionSettings
    from attnctrl.pipelines.latents import decibels, squared_error

    begin = time.monotonic()
    width, height = inverter.defaults["size"]
    renders = [Image.fromarray(image) for _, image in held_out_renders(pictures, (width, height))]
    clean = inverter.encode(renders)
    methods = [one for one in inverter.methods if one != "controlled"]
    tick, rows = Counter(2 * len(methods) * len(steps), progress), []
    for method in methods:
        before: list[float] = []
        for count in steps:
            settings = InversionSettings(method=method, steps=count)
            with _counted(parts_of(inverter.pipe)[0]) as forwards:
                found = inverter.invert(renders, settings)
                tick(1)
                again = inverter.generate(found).clean
                tick(1)
            errors = (again - clean.cpu()).flatten(1).square().mean(1).sqrt().tolist()
            quality = [decibels(one) for one in squared_error(inverter.pixels(again, (width, height)), renders)]
            gains = [old / new for old, new in zip(before, errors, strict=True)] if before else []
            rows.append(
                {"method": method, "steps": count, "forwards": len(forwards), "rms": median(errors),
                 "worst": max(errors), "gain": median(gains) if gains else None, "psnr": median(quality),
                 "least_psnr": min(quality)}
            )  # fmt: skip
            before = errors
    vae = [decibels(one) for one in squared_error(inverter.pixels(clean, (width, height)), renders)]
    seconds = round(time.monotonic() - begin, 3)
    return {"suite": "inversion", "n": pictures, "seconds": seconds, "vae_psnr": median(vae), "rows": rows}


@contextmanager
def _counted(model: nn.Module) -> Iterator[list[None]]:
    """A list that grows with every finished forward of `model`."""
    calls: list[None] = []
    hook = model.register_forward_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()
