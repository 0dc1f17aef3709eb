"""Regions of the picture: boxes and masks, and which tokens of a grid belong to them (area coverage, never empty)."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import LayoutError

__all__ = ["Grid", "Overlap", "Region", "by", "centre", "coverage", "extent", "labels", "membership", "segments"]

Overlap = Literal["union", "priority", "background"]
Grid = tuple[int, ...]
"""(rows, columns) of a picture's tokens, or (frames, rows, columns) of a film's."""

# a token is a region's own from half coverage on; the slack keeps exact halves inside in floating point
_HALF = 0.5 - 1e-6


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the picture and the text that describes it.

    Attributes:
        prompt: what is to be seen there, encoded by itself.
        box: (x0, y0, x1, y1) as shares of width and height in [0, 1].
        mask: [H, W] array, tensor or picture in [0, 1] (bool; integers up to 255), at any resolution; instead of `box`.
            With neither, the region is the whole canvas.
        name: used in messages and reports; the prompt when empty.
        strength: in [0, 1], multiplies the strength of the control that holds the region.
        reference: index of the reference picture that belongs to this region alone; None leaves references open to all.
        negative_prompt: what is not to be seen there, see `attnctrl.presets.against`.
        prompt_embeds: [tokens, channels], the encoded prompt, for a bare model without a text encoder.
        spans: tokens [start, stop) of the pipeline's prompt that tell of this region, from `attnctrl.phrase_spans`;
            they are its text, and none is encoded and appended. For controls of the prompt's branch alone.

    Raises:
        LayoutError: when box, mask, strength or spans are out of range.
    """

    prompt: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Any = None
    name: str | None = None
    strength: float = 1.0
    reference: int | None = None
    prompt_embeds: Tensor | None = None
    spans: Sequence[tuple[int, int]] = ()
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        if self.box is not None and self.mask is not None:
            raise LayoutError(f"Region '{self.label}' has both a box and a mask; give one of them.")
        if self.box is not None:
            object.__setattr__(self, "box", _checked_box(self.box, self.label))
        if self.mask is not None:
            object.__setattr__(self, "mask", _mask_tensor(self.mask, self.label))
        if not 0 <= self.strength <= 1:
            raise LayoutError(f"Region '{self.label}': strength must be in [0, 1]; found {self.strength}.")
        if self.reference is not None and self.reference < 0:
            raise LayoutError(f"Region '{self.label}': reference must be an index from 0; found {self.reference}.")
        if self.prompt_embeds is not None and self.prompt_embeds.ndim != 2:
            shape = tuple(self.prompt_embeds.shape)
            raise LayoutError(f"Region '{self.label}': prompt_embeds must be [tokens, channels]; found {shape}.")
        spans = tuple((int(start), int(stop)) for start, stop in self.spans)
        if any(not 0 <= start < stop for start, stop in spans):
            raise LayoutError(f"Region '{self.label}': spans are tokens [start, stop) from 0; found {spans}.")
        object.__setattr__(self, "spans", spans)

    @property
    def label(self) -> str:
        """The name shown to people."""
        return self.name or self.prompt or "region"

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields; the mask as compressed float32 text.

        Raises:
            LayoutError: when the region holds encoded text, which has no place in a JSON file.
        """
        if self.prompt_embeds is not None:
            raise LayoutError(
                f"Region '{self.label}' holds prompt_embeds, which are not written to JSON; give a prompt."
            )
        data: dict[str, Any] = {"prompt": self.prompt}
        if self.box is not None:
            data["box"] = list(self.box)
        if self.mask is not None:
            packed = base64.b64encode(zlib.compress(self.mask.numpy().tobytes())).decode("ascii")
            data["mask"] = {"shape": list(self.mask.shape), "float32": packed}
        for key, default in (("name", None), ("strength", 1.0), ("reference", None), ("negative_prompt", "")):
            if getattr(self, key) != default:
                data[key] = getattr(self, key)
        if self.spans:
            data["spans"] = [list(span) for span in self.spans]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Region:
        """The region that `to_dict` described."""
        fields = dict(data)
        if isinstance(mask := fields.get("mask"), Mapping):
            raw = bytearray(zlib.decompress(base64.b64decode(mask["float32"])))
            fields["mask"] = torch.frombuffer(raw, dtype=torch.float32).reshape(mask["shape"])
        if fields.get("box") is not None:
            fields["box"] = tuple(fields["box"])
        return cls(**fields)


def segments(segmentation: Any, prompts: Mapping[int, str]) -> list[Region]:
    """Regions of a segmentation map, as Seg2Any takes it (arXiv 2506.00596): one for each label that has a text.

    Args:
        segmentation: whole numbers [H, W] (array, tensor, or picture of one channel), a label for each pixel.
        prompts: label -> text. Pixels of other labels are in no region.

    Raises:
        LayoutError: when the map is no such thing, or holds no pixel of a label.
    """
    found = segmentation
    if not isinstance(found, Tensor):
        import numpy as np

        found = torch.from_numpy(np.array(found))
    if found.ndim != 2 or found.is_floating_point():
        raise LayoutError(
            f"A segmentation map is whole numbers [H, W]; found {found.dtype} of shape {tuple(found.shape)}. Give it "
            "one channel with a label for each pixel."
        )
    there = set(found.unique().tolist())
    if absent := [label for label in prompts if label not in there]:
        raise LayoutError(
            f"The segmentation map has no pixel of label {absent[0]} ('{prompts[absent[0]]}'); it holds "
            f"{', '.join(map(str, sorted(there)[:20]))}."
        )
    return [Region(text, mask=found == label) for label, text in prompts.items()]


def _checked_box(box: Sequence[float], label: str) -> tuple[float, float, float, float]:
    if len(box) != 4:
        raise LayoutError(f"Region '{label}': a box is (x0, y0, x1, y1); found {tuple(box)}.")
    x0, y0, x1, y1 = (float(value) for value in box)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise LayoutError(
            f"Region '{label}': a box is (x0, y0, x1, y1) as shares of the picture with 0 <= x0 < x1 <= 1 and the same "
            f"for y; found {(x0, y0, x1, y1)}. Divide pixels by the width and height."
        )
    return x0, y0, x1, y1


def _mask_tensor(mask: Any, label: str) -> Tensor:
    if not isinstance(mask, Tensor):
        if hasattr(mask, "convert"):  # a PIL picture
            mask = mask.convert("L")
        import numpy as np

        mask = torch.from_numpy(np.array(mask))
    whole = not (mask.dtype == torch.bool or mask.is_floating_point())
    mask = mask.detach().to(device="cpu", dtype=torch.float32).contiguous()
    if mask.ndim != 2 or 0 in mask.shape:
        raise LayoutError(f"Region '{label}': a mask is [H, W]; found shape {tuple(mask.shape)}.")
    if whole and float(mask.max()) > 1:
        mask = mask / 255
    low, high = float(mask.min()), float(mask.max())
    if not (low >= 0 and high <= 1):
        raise LayoutError(
            f"Region '{label}': mask values must be in [0, 1] (integers up to 255); found {low:g}..{high:g}."
        )
    if high == 0:
        raise LayoutError(f"Region '{label}': the mask is empty; give it at least one pixel.")
    return mask


def by(grid: Grid) -> str:
    """A grid for people: "24 x 36"."""
    return " x ".join(map(str, grid))


def coverage(region: Region, grid: Grid) -> Tensor:
    """The share of each token's square that the region covers: float64 [h, w] in [0, 1], exact for boxes and masks.

    A film's region covers the same squares in every frame.
    """
    height, width = grid[-2:]
    if region.mask is not None:
        mask = region.mask.to(torch.float64)
        rows, columns = (_resample(source, target) for source, target in zip(mask.shape, grid[-2:], strict=True))
        return rows @ mask @ columns.T
    x0, y0, x1, y1 = region.box or (0.0, 0.0, 1.0, 1.0)
    return torch.outer(_overlap(y0 * height, y1 * height, height), _overlap(x0 * width, x1 * width, width))


def centre(region: Region) -> tuple[float, float]:
    """(x, y) of a region's middle as shares of the picture: of its box, or the centre of gravity of its mask."""
    if region.mask is not None:
        mask = region.mask.to(torch.float64)
        rows, columns = ((torch.arange(side, dtype=torch.float64) + 0.5) / side for side in mask.shape)
        return float(mask.sum(0) @ columns / mask.sum()), float(mask.sum(1) @ rows / mask.sum())
    x0, y0, x1, y1 = region.box or (0.0, 0.0, 1.0, 1.0)
    return (x0 + x1) / 2, (y0 + y1) / 2


def extent(region: Region) -> tuple[float, float, float, float]:
    """(x0, y0, x1, y1) around a region as shares of the picture; of a mask, around what is half or more in it, or
    nowhere more."""
    if region.mask is None:
        return region.box or (0.0, 0.0, 1.0, 1.0)
    held = region.mask >= min(_HALF, float(region.mask.max()))
    (y0, y1), (x0, x1) = _ends(held.any(1)), _ends(held.any(0))
    return x0, y0, x1, y1


def _ends(held: Tensor) -> tuple[float, float]:
    """Where the first marked cell of a row begins and the last one ends, as shares of the row."""
    found = held.nonzero().flatten().tolist()
    return found[0] / len(held), (found[-1] + 1) / len(held)


def _overlap(start: float, stop: float, cells: int) -> Tensor:
    """Length of [start, stop] inside each unit cell: float64 [cells]."""
    left = torch.arange(cells, dtype=torch.float64)
    return ((left + 1).clamp(max=stop) - left.clamp(min=start)).clamp(min=0)


def _resample(source: int, target: int) -> Tensor:
    """float64 [target, source]: row t averages the source cells by the length they share with target cell t."""
    step = source / target
    return torch.stack([_overlap(t * step, (t + 1) * step, source) for t in range(target)]) / step


def labels(region: Region, grid: Grid) -> Tensor:
    """bool [h, w]: tokens covered by half or more; never empty, the best covered token stays."""
    share = coverage(region, grid)
    label = share >= _HALF
    if not bool(label.any()):
        label.view(-1)[int(share.argmax())] = True
    return label


def membership(regions: Sequence[Region], grid: Grid, overlap: Overlap = "union") -> Tensor:
    """Which image token is in which region: bool [R, tokens of the grid].

    Args:
        overlap: "union", a token may be in several regions; "priority", later regions lie on top of earlier ones;
            "background", tokens of several regions belong to none.

    Raises:
        LayoutError: when the policy leaves a region without a token.
    """
    if not regions:
        return torch.zeros(0, prod(grid), dtype=torch.bool)
    member = torch.stack([labels(region, grid).flatten().repeat(prod(grid[:-2])) for region in regions])
    if overlap == "priority":
        above = member.flip(0).cumsum(0).flip(0) - member.long()
        member = member & (above == 0)
    elif overlap == "background":
        member = member & (member.sum(0) == 1)
    empty = [region.label for region, tokens in zip(regions, member.sum(1).tolist(), strict=True) if tokens == 0]
    if empty:
        raise LayoutError(
            f"With overlap='{overlap}' on a grid of {by(grid)} tokens nothing is left of: "
            f"{', '.join(empty)}. Move the regions apart, reorder them, or use overlap='union'."
        )
    return member
