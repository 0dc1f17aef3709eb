"""What controls cost a model that they leave alone, and how many graphs a compiled model needs with them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from .attach import attach, parts_of
from .controls import Control, Isolate, Regions
from .execute.bench import interleaved
from .peek import first_forward
from .processors import processors, set_processors
from .region import Region

__all__ = ["bench_compile", "bench_idle"]

IDLE = (Isolate(strength=0.0), Regions([]))


def bench_idle(pipe: Any, size: tuple[int, int], repeats: int = 31, **arguments: Any) -> dict[str, Any]:
    """Time forwards of a pipeline's denoiser without controls, and of a copy with idle ones attached.

    Args:
        pipe: any pipeline of a known family; its first forward for one prompt is repeated.
        size: (width, height) in pixels.
        repeats: rounds of the interleaved loop, after one round to warm up.
        arguments: further ones of the pipeline's call.

    Returns:
        {"suite": "idle", "rows": [...]}; a row holds case, model, size, idle_s, vanilla_s (seconds, medians), ratio,
        and whether the outputs are bit-equal.
    """
    model: Any = parts_of(pipe)[0]
    inputs = first_forward(pipe, prompt="a red circle", width=size[0], height=size[1], **arguments)
    other = copy.deepcopy(model)
    with attach(other, IDLE), torch.inference_mode():
        equal = torch.equal(model(**inputs)[0], other(**inputs)[0])
        seconds = interleaved({"vanilla": lambda: model(**inputs), "idle": lambda: other(**inputs)}, repeats)
    row = {
        "case": "attached, idle",
        "model": type(model).__name__,
        "size": list(size),
        "idle_s": seconds["idle"],
        "vanilla_s": seconds["vanilla"],
        "ratio": seconds["idle"] / seconds["vanilla"],
        "bit_equal": equal,
    }
    return {"suite": "idle", "rows": [row]}


@contextmanager
def _swapped(pipe: Any, controls: Sequence[Control]) -> Iterator[None]:
    """The processors door, for the length of a `with`."""
    model: Any = parts_of(pipe)[0]
    before = {f"{name}.processor": one.processor for name, one in model.named_modules() if hasattr(one, "processor")}
    set_processors(model, processors(pipe, controls))
    try:
        yield
    finally:
        set_processors(model, before)


DOORS: Mapping[str, Callable[[Any, Sequence[Control]], AbstractContextManager[Any]]] = {
    "attach": attach,
    "processors": _swapped,
}


def bench_compile() -> dict[str, Any]:
    """Count the graphs of compiled tiny models: FLUX with 6 + 6 blocks and SD3, whole and by repeated blocks.

    Returns:
        {"suite": "compile", "rows": [...]}; a row holds case, door, and numbers of full graphs: vanilla (the plain
        model alone), controlled (the model alone, under `Regions` and `Isolate`), idle (more of them when idle controls
        come to a plain model that is compiled), strength (more of them when the strength of soft controls changes), off
        (more of them when all controls have left and a plain forward has been compiled before).
    """
    rows = []
    for case, make, how in _compiled_cases():
        for door, put in DOORS.items():
            rows.append({"case": case, "door": door, **_graphs(make, how, put)})
    return {"suite": "compile", "rows": rows}


def _compiled_cases() -> list[tuple[str, Callable[[], Any], str]]:
    from .toybox.models.flux import FluxSizes, flux_pipeline
    from .toybox.models.sd3 import SD3Sizes, sd3_pipeline

    flux = FluxSizes(heads=2, head_dim=16, axes=(4, 6, 6), double_blocks=6, single_blocks=6, text_width=32)
    sd3 = SD3Sizes(heads=2, head_dim=16, blocks=4, text_width=32)
    return [
        ("FLUX 6 + 6, repeated blocks", lambda: flux_pipeline(flux), "compile_repeated_blocks"),
        ("FLUX 6 + 6, whole", lambda: flux_pipeline(flux), "compile"),
        ("SD3 with a dual block, whole", lambda: sd3_pipeline(sd3), "compile"),
    ]


def _graphs(make: Callable[[], Any], how: str, put: Callable[..., AbstractContextManager[Any]]) -> dict[str, int]:
    from torch._dynamo.testing import CompileCounter

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"prompt": "a red circle", "max_sequence_length": 8, "width": 64, "height": 64}
    plain = parts_of(pipe)[0]
    inputs = first_forward(pipe, num_inference_steps=1, guidance_scale=1.0, **arguments)
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    regions = [Region(word, box=box) for word, box in zip(("a red circle", "a blue star"), boxes, strict=True)]

    def controls(strength: float) -> list[Control]:
        return [Regions(regions, strength=strength), Isolate()]

    counter: Any = CompileCounter()

    def fresh() -> nn.Module:
        nonlocal counter
        # compiled code depends on which models are under control; processors leave theirs when they are collected
        gc.collect()
        torch._dynamo.reset()
        counter = CompileCounter()
        model: Any = copy.deepcopy(plain)
        getattr(model, how)(backend=counter, fullgraph=True)
        pipe.register_modules(transformer=model)
        return model

    def more(model: nn.Module, given: Sequence[Control] | None = None) -> int:
        before = counter.frame_count
        if given is None:
            model(**inputs)
        else:
            with put(pipe, given):
                model(**inputs)
        return int(counter.frame_count - before)

    with torch.no_grad():
        model = fresh()
        found = {"vanilla": more(model), "idle": more(model, IDLE)}
        more(model, controls(1.0))
        found["off"] = more(model)
        model = fresh()
        found["controlled"] = more(model, controls(1.0))
        model = fresh()
        more(model, controls(0.5))
        found["strength"] = sum(more(model, controls(strength)) for strength in (0.7, 0.3))
    torch._dynamo.reset()
    return found
