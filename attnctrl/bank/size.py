"""How many bytes a capture will take, told before it runs: from the layers, tokens, steps, branches and the dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedModelError
from .packing import moments_bytes, packed_bytes

if TYPE_CHECKING:
    from ..controls.keep import Keep
    from ..region import Grid

__all__ = ["Need", "predict"]


@dataclass(frozen=True)
class Need:
    """What a capture will keep.

    Attributes:
        nbytes: of keys and values, and of queries, outputs and moments where they are kept.
        layers: number of layers.
        share: of their image tokens, the share that is kept, mean over layers and pictures.
        steps: those that are kept.
        branches: number of guidance branches.
        pictures: number of pictures.
    """

    nbytes: int
    layers: int
    share: float
    steps: tuple[int, ...]
    branches: int
    pictures: int

    def __str__(self) -> str:
        return (
            f"{self.nbytes / 1e9:.3g} GB: {self.pictures} pictures, {self.layers} layers, {self.share:.3g} of their "
            f"tokens, {len(self.steps)} steps, {self.branches} branches"
        )


def predict(
    pipe_or_model: Any,
    keep: Keep,
    *,
    width: int | None = None,
    height: int | None = None,
    grid: Grid | None = None,
    steps: int = 50,
    sigmas: Sequence[float] | None = None,
    pictures: int = 1,
    branches: int = 2,
    text_tokens: int = 77,
) -> Need:
    """What `keep` will take of a run. Runs nothing; a model on the meta device will do.

    Args:
        pipe_or_model: a pipeline or its denoiser, in the dtype that it will run in.
        keep: the control, with its bank; regions are its own.
        width, height: pixels of the picture; or `grid`, its (rows, columns) of image tokens.
        steps: of the run; `sigmas` are its noise levels, for sigma windows.
        pictures: of the batch.
        branches: guidance branches that the run has; one is kept where `keep` names its branch.
        text_tokens: length of the encoded prompt.

    Raises:
        UnsupportedModelError: the sizes of a layer's keys cannot be told.
        AttnCtrlError: whatever `attach` would raise.
    """
    from ..attach import parts_of
    from ..controls.keep import held_of, is_kept_layer, kept_of
    from ..explain import grid_of
    from ..families import family_of
    from ..layout import Measures
    from ..schedule import active_steps
    from ..stack import Stack

    model, pipe = parts_of(pipe_or_model)
    model = getattr(model, "_orig_mod", model)
    family = family_of(model)
    stack = Stack([keep], family.layers(model), family.presets)
    size = grid or grid_of(pipe, family, width, height)
    frames = family.arrange(model, Measures(text_tokens, size))
    levels = tuple(sigmas) if sigmas is not None else tuple(1 - i / steps for i in range(steps))
    kept = tuple(step for step in active_steps(keep.window, levels) if keep.is_kept(step))
    rows = min(pictures, keep.pictures or pictures)
    dtype = next(model.parameters()).dtype
    layers = [
        layer
        for seat in stack.seats
        for layer in stack.layers
        if layer.name in seat.layers and is_kept_layer(frames[layer.frame])
    ]
    keep.check_texts([frames[layer.frame] for layer in layers])
    each, outputs, shares = 0, 0, []
    for layer in layers:
        channels, heads, queries = key_sizes(layer.module)
        told = moments_bytes(channels, queries, dtype) if keep.moments else 0
        keys, own = frames[layer.frame].keys, (keep.bank.dtype, dtype)
        tokens = keys.grid
        for picture in range(rows):
            scene = picture * stack.scenes // pictures
            names = tuple(region.label for region in stack.regions(scene))
            held = held_of(keep.tokens, tokens, names, stack.member(scene, tokens))
            each += 2 * packed_bytes(len(kept_of(keys, held, keep.texts)), channels, heads, *own) + told
            if keep.queries:
                asking = len(kept_of(frames[layer.frame].queries, held, keep.texts))
                each += packed_bytes(asking, queries, heads * queries // channels, *own)
            outputs += packed_bytes(len(held.tokens), queries, heads * queries // channels, *own)
            shares.append(len(held.tokens) / torch.Size(tokens).numel())
    count = branches if keep.branch == "all" else 1
    share = sum(shares) / len(shares) if shares else 0.0
    nbytes = (each * len(kept) + outputs * sum(keep.keeps_outputs(step, levels) for step in kept)) * count
    return Need(nbytes, len(layers), share, kept, count, rows)


def key_sizes(module: Any) -> tuple[int, int, int]:
    """(channels of all heads, heads) of the keys that an attention module makes, and channels of its queries.

    Raises:
        UnsupportedModelError: when it does not tell.
    """
    query, key = (getattr(getattr(module, name, None), "out_features", 0) for name in ("to_q", "to_k"))
    heads = getattr(module, "heads", 0)
    if not (query and key and heads):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not tell the size of its keys (to_q, to_k, heads), so what a bank will take "
            "cannot be told. Capture one step and look at bank.nbytes."
        )
    return key, key // (query // heads), query
