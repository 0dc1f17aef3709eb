"""What a step with a perturbed branch costs: measured, counted and bounded; beside it diffusers' own.

The bound of a step is vanilla's forward and rho of a forward on the prompt's rows: what comes behind the first
perturbed product of attention is all that differs (its projection, and all that follows). It is told twice: with rho
counted in operations, and with the seconds that a forward of the prompt's rows takes behind that product, since an
operation of one layer may take longer than one of another (a UNet's on its finest level).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .attach import attach
from .controls import Perturb
from .execute.bench import interleaved, rounds
from .families import family_of
from .guidance import rows_of_arguments
from .select import Layer, select

__all__ = ["CASES", "Case", "bench_guidance", "flops", "rho"]

HEADS, TEXT = 4, 32
BRANCHES = {"none": ("cond",), "batched": ("uncond", "cond")}
SCALES = {"guidance": 5.0, "perturbed": 3.0}
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A family: a deep model with random weights, what it is given, and layers from its beginning to its end.

    Attributes:
        model: (config) -> the model.
        config: of the model.
        inputs: (rows, side of the picture in tokens, channels of a token of text) -> arguments of a forward.
        layers: name -> selector.
        theirs: by guidance, diffusers' own processor that perturbs, and the fields of `Perturb` that mean the same.
    """

    model: Callable[..., Any]
    config: dict[str, Any]
    inputs: Callable[[int, int, int], dict[str, Any]]
    layers: Mapping[str, str]
    theirs: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def _normal(rows: int, *shape: int, seed: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def _flux_inputs(rows: int, side: int, width: int) -> dict[str, Any]:
    from .toybox.models.flux import position_ids

    return {
        "hidden_states": _normal(1, side * side, 16, seed=0).repeat(rows, 1, 1),
        "encoder_hidden_states": _normal(rows, TEXT, width, seed=1),
        "pooled_projections": _normal(rows, 64, seed=2),
        "timestep": torch.full((rows,), 0.5),
        "img_ids": position_ids(side, side),
        "txt_ids": torch.zeros(TEXT, 3),
        "return_dict": False,
    }


def _sd3_inputs(rows: int, side: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": _normal(1, 4, side, side, seed=0).repeat(rows, 1, 1, 1),
        "encoder_hidden_states": _normal(rows, TEXT, width, seed=1),
        "pooled_projections": _normal(rows, 64, seed=2),
        "timestep": torch.full((rows,), 500.0),
        "return_dict": False,
    }


def _unet_inputs(rows: int, side: int, width: int) -> dict[str, Any]:
    return {
        "sample": _normal(1, 4, 2 * side, 2 * side, seed=0).repeat(rows, 1, 1, 1),
        "encoder_hidden_states": _normal(rows, TEXT, width, seed=1),
        "timestep": torch.tensor(500.0),
        "return_dict": False,
    }


def _cases(width: int) -> dict[str, Case]:
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    head = width // HEADS
    joint = {
        "num_attention_heads": HEADS,
        "attention_head_dim": head,
        "joint_attention_dim": width,
        "pooled_projection_dim": 64,
        "patch_size": 1,
    }
    axes = (head // 4, 3 * head // 8, 3 * head // 8)
    flux = {**joint, "num_layers": 8, "num_single_layers": 16, "axes_dims_rope": axes, "in_channels": 16}
    sides = {"sample_size": 64, "pos_embed_max_size": 64}
    channels = {"in_channels": 4, "out_channels": 4}
    sd3 = {**joint, **sides, **channels, "num_layers": 24, "caption_projection_dim": width}
    unet = {
        "sample_size": 64,
        "block_out_channels": (width // 4, width // 2, width, width),
        "attention_head_dim": 8,
        "cross_attention_dim": width,
        "norm_num_groups": width // 8,
    }
    return {
        "flux": Case(
            FluxTransformer2DModel,
            flux,
            _flux_inputs,
            {"early": "double:2", "middle": "single:4", "late": "single:13"},
        ),
        "sd3": Case(
            SD3Transformer2DModel,
            sd3,
            _sd3_inputs,
            {"early": "joint:2", "middle": "joint:12", "late": "joint:21"},
            {"none": "PAGJointAttnProcessor2_0", "batched": "PAGCFGJointAttnProcessor2_0"},
            {"rows": "image", "block": "within"},
        ),
        "unet": Case(
            UNet2DConditionModel,
            unet,
            _unet_inputs,
            {"early": "down.self:2", "middle": "mid.self:0", "late": "up.self:7"},
            {"none": "PAGIdentitySelfAttnProcessor2_0", "batched": "PAGCFGIdentitySelfAttnProcessor2_0"},
        ),
    }


CASES = ("flux", "sd3", "unet")


def bench_guidance(repeats: int = 9, side: int = 24, width: int = 256, cases: Sequence[str] = CASES) -> dict[str, Any]:
    """Time and count denoiser steps with a perturbed branch.

    Args:
        repeats: rounds of the interleaved loops, after one round to warm up.
        side: of the picture, in tokens.
        width: channels of a token; at 256 and a side of 24 a forward takes 23 to 32 GFLOP.
        cases: names out of `CASES`.

    Returns:
        {"suite": "guidance cost", "rows": [...], "theirs": [...]}. A row holds family, layer, cfg ("none": a forward of
        the prompt alone; "batched": with the negative prompt), rho, bound, bound_s (with rho in seconds), flop_ratio
        (floating-point operations of a step / vanilla's), step_ratio (the median over rounds), vanilla_s, full_ratio
        (without replay), and max_err, the largest difference of replay from the whole forward. A row of "theirs"
        compares with diffusers' own processors: ours_ratio, theirs_ratio, and max_err of the guided predictions.
    """
    made = _cases(width)
    rows: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in cases:
            case = made[name]
            model = _random(case)
            shares = {
                x: rho(model, _first(model, layers), case.inputs(1, side, width)) for x, layers in case.layers.items()
            }
            for cfg in BRANCHES:
                inputs = case.inputs(len(BRANCHES[cfg]), side, width)
                twin = _twin(model)
                layers = {where: _first(twin, selector) for where, selector in case.layers.items()}
                timed = _Timed(twin, layers, case.inputs(1, side, width))
                rows += [
                    {"family": name, "cfg": cfg, **row}
                    for row in _rows(case, model, cfg, shares, timed, inputs, repeats)
                ]
                if case.theirs:
                    theirs.append({"family": name, "cfg": cfg, **_theirs(case, model, cfg, inputs, repeats)})
    sizes = {"side": side, "width": width, "repeats": repeats, "threads": torch.get_num_threads()}
    return {"suite": "guidance cost", **sizes, "rows": rows, "theirs": theirs}


def _random(case: Case) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return case.model(**case.config).eval().requires_grad_(False)


def _twin(model: nn.Module) -> Any:
    """Another model with the same weights, to be attached to by itself."""
    return copy.deepcopy(model, {id(one): one for one in (*model.parameters(), *model.buffers())})


def _rows(
    case: Case, model: Any, cfg: str, shares: Mapping[str, float], timed: _Timed, inputs: Inputs, repeats: int
) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[], Any]] = {"vanilla": partial(model, **inputs), "timed": timed}
    with ExitStack() as stack:
        for where, layers in case.layers.items():
            for name, replay in ((where, True), (_full(where), False)):
                twin = _twin(model)
                control = Perturb(layers=layers, scale=SCALES["perturbed"], replay=replay)
                stack.enter_context(attach(twin, control, branches=BRANCHES[cfg]))
                calls[name] = partial(twin, **inputs)
        outputs = {name: call()[0] for name, call in calls.items()}
        counted = {name: flops(calls[name]) for name in ("vanilla", *case.layers)}
        seconds = rounds(calls, repeats)

    def ratio(taken: Sequence[float]) -> float:
        # of each round by itself: what slows the machine for a while slows all of it
        return median(one / base for one, base in zip(taken, seconds["vanilla"], strict=True))

    return [
        {
            "layer": where,
            "selected": layers,
            "rho": shares[where],
            "bound": (len(BRANCHES[cfg]) + shares[where]) / len(BRANCHES[cfg]),
            "bound_s": 1 + ratio(timed.behind[where][-repeats:]),
            "flop_ratio": counted[where] / counted["vanilla"],
            "step_ratio": ratio(seconds[where]),
            "full_ratio": ratio(seconds[_full(where)]),
            "vanilla_s": median(seconds["vanilla"]),
            "max_err": float((outputs[where] - outputs[_full(where)]).abs().max()),
        }
        for where, layers in case.layers.items()
    ]


def _full(where: str) -> str:
    return f"{where}, in full"


def _first(model: Any, layers: str) -> Layer:
    family = family_of(model)
    return select(family.layers(model), layers, family.presets)[0]


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions, those within attention included."""
    # the kernels of the CPU are not in PyTorch's table
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def rho(model: Any, layer: Layer, inputs: Inputs) -> float:
    """The share of a forward's operations that come behind the product of attention in a layer."""
    before: list[int] = []
    counter = FlopCounterMode(display=False)
    with _behind(layer, lambda: before.append(counter.get_total_flops())), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return 1 - before[0] / counter.get_total_flops()


@contextmanager
def _behind(layer: Layer, call: Callable[[], object]) -> Iterator[None]:
    """Call when the product of attention of a layer is there."""
    out = getattr(layer.module, "to_out", None)
    # layers whose block projects what they give have none
    place, register = (layer.module, "register_forward_hook") if out is None else (out[0], "register_forward_pre_hook")
    hook = getattr(place, register)(lambda *_: call())
    try:
        yield
    finally:
        hook.remove()


class _Timed:
    """A forward that notes the seconds behind the product of attention of some layers, in `behind` by their names."""

    def __init__(self, model: Any, layers: Mapping[str, Layer], inputs: Inputs) -> None:
        self._model, self._layers, self._inputs = model, layers, inputs
        self.behind: dict[str, list[float]] = {where: [] for where in layers}

    def __call__(self) -> Any:
        met: dict[str, float] = {}
        with ExitStack() as stack:
            for where, layer in self._layers.items():
                stack.enter_context(_behind(layer, partial(_note, met, where)))
            output = self._model(**self._inputs)
        end = time.perf_counter()
        for where, at in met.items():
            self.behind[where].append(end - at)
        return output


def _note(met: dict[str, float], where: str) -> None:
    met[where] = time.perf_counter()


def _theirs(case: Case, model: Any, cfg: str, inputs: Inputs, repeats: int) -> dict[str, Any]:
    """Diffusers' pipelines put the perturbed rows behind the others, in one batch."""
    from diffusers.models import attention_processor

    branches, layers = BRANCHES[cfg], case.layers["middle"]
    other, twin = _twin(model), _twin(model)
    _first(other, layers).module.set_processor(getattr(attention_processor, case.theirs[cfg])())
    more = rows_of_arguments(inputs, [*range(len(branches)), -1], len(branches), ())
    control = Perturb(layers=layers, scale=SCALES["perturbed"], **case.fields)
    with attach(twin, control, branches=branches):
        calls = {
            "vanilla": lambda: model(**inputs),
            "ours": lambda: twin(**inputs),
            "theirs": lambda: other(**more),
        }
        ours, (*rows, perturbed) = calls["ours"]()[0], calls["theirs"]()[0]
        seconds = interleaved(calls, repeats)
    expected = _guided(rows) + SCALES["perturbed"] * (rows[-1] - perturbed)
    return {
        "layer": "middle",
        "ours_ratio": seconds["ours"] / seconds["vanilla"],
        "theirs_ratio": seconds["theirs"] / seconds["vanilla"],
        "vanilla_s": seconds["vanilla"],
        "max_err": float((_guided(list(ours)) - expected).abs().max()),
        "moved": float((rows[-1] - perturbed).abs().max()),
    }


def _guided(rows: list[Tensor]) -> Tensor:
    """u + s (c - u) of rows [u, c]; c alone as it is."""
    return rows[-1] if len(rows) == 1 else torch.lerp(rows[0], rows[1], SCALES["guidance"])
