"""Named token ranges of one forward, and regions of the picture turned into token labels.

layout = Layout.of(text=12, image=(8, 8))                    # tokens in the model's own order
member = membership([Region("a cat", box=(0, 0, .5, 1))], (8, 8))
atom, groups = partition(layout, member, ...)                # sets of tokens that controls treat alike
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import LayoutError

__all__ = [
    "Frame",
    "Frames",
    "Grid",
    "Group",
    "Layout",
    "Measures",
    "Overlap",
    "Region",
    "TokenRange",
    "coverage",
    "labels",
    "membership",
    "partition",
]

Overlap = Literal["union", "priority", "background"]
Kind = Literal["global", "region_text", "pad", "image", "reference", "register"]
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
        prompt_embeds: [tokens, channels], the encoded prompt, for a bare model without a text encoder.

    Raises:
        LayoutError: when box, mask or strength are out of range.
    """

    prompt: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: Any = None
    name: str | None = None
    strength: float = 1.0
    reference: int | None = None
    prompt_embeds: Tensor | None = None

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
        for key, default in (("name", None), ("strength", 1.0), ("reference", None)):
            if getattr(self, key) != default:
                data[key] = getattr(self, key)
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


@dataclass(frozen=True)
class Measures:
    """What one forward is given: tokens of the encoded prompt, the grid of the latents, those of reference pictures."""

    text: int
    image: Grid
    references: Sequence[Grid] = ()


@dataclass(frozen=True)
class TokenRange:
    """Tokens [start, stop) of a sequence under one name; `grid` when they are a picture or a film in raster order."""

    name: str
    start: int
    stop: int
    grid: Grid | None = None

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The token ranges of one forward, in sequence order without gaps.

    Names: "text.global" (the prompt), "text.region<r>" (texts appended by controls), "text.pad" (filling up a batch),
    "image" (the latents, with their grid), "reference.<k>" (reference pictures, with theirs), "registers" (learned
    tokens that stand for nothing).
    """

    ranges: tuple[TokenRange, ...]

    def __post_init__(self) -> None:
        end = 0
        for item in self.ranges:
            if item.start != end or item.stop < item.start:
                raise LayoutError(f"Token ranges must follow each other without gaps; found {self.ranges}.")
            if item.grid is not None and prod(item.grid) != len(item):
                raise LayoutError(f"'{item.name}' has {len(item)} tokens but a grid of {by(item.grid)}.")
            end = item.stop

    @classmethod
    def of(cls, *, order: Sequence[str] = ("text", "image", "references"), registers: int = 0, **sizes: Any) -> Layout:
        """The given kinds of tokens in `order`: "text", "image", "references", "registers" (tokens that stand for
        nothing). `sizes` are the fields of `Measures`.
        """
        measures = Measures(**sizes)
        kinds: dict[str, list[tuple[str, int, Grid | None]]] = {
            "text": [("text.global", measures.text, None)],
            "image": [("image", prod(measures.image), measures.image)],
            "references": [(f"reference.{k}", prod(grid), grid) for k, grid in enumerate(measures.references)],
            "registers": [("registers", registers, None)],
        }
        return cls(_consecutive([item for kind in order for item in kinds[kind]]))

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.ranges[-1].stop

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(item.name for item in self.ranges)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> TokenRange:
        for item in self.ranges:
            if item.name == name:
                return item
        raise LayoutError(f"There are no tokens named '{name}'; this forward has {', '.join(self.names)}.")

    @property
    def grid(self) -> Grid:
        """Grid of the image tokens."""
        grid = self["image"].grid
        if grid is None:
            raise LayoutError("The image tokens have no grid; regions need one.")
        return grid

    def with_texts(self, texts: Sequence[tuple[str, int]], pad: int = 0) -> Layout:
        """The layout after `texts` (name, tokens) and `pad` unused tokens are appended to the global text."""
        sized: list[tuple[str, int, Grid | None]] = []
        for item in self.ranges:
            sized.append((item.name, len(item), item.grid))
            if item.name == "text.global":
                sized += [(name, count, None) for name, count in texts]
                sized += [("text.pad", pad, None)] if pad else []
        return Layout(_consecutive(sized))


def _consecutive(sized: Sequence[tuple[str, int, Grid | None]]) -> tuple[TokenRange, ...]:
    ranges, start = [], 0
    for name, count, grid in sized:
        ranges.append(TokenRange(name, start, start + count, grid))
        start += count
    return tuple(ranges)


@dataclass(frozen=True)
class Frame:
    """Who stands in the rows and who in the columns of a layer's attention; one object for joint attention."""

    queries: Layout
    keys: Layout

    @classmethod
    def joint(cls, layout: Layout) -> Frame:
        """Self-attention of one sequence."""
        return cls(layout, layout)

    @property
    def is_joint(self) -> bool:
        return self.queries is self.keys

    @property
    def tokens(self) -> tuple[int, int]:
        """(queries, keys)."""
        return self.queries.tokens, self.keys.tokens

    @property
    def grid(self) -> Grid | None:
        """Grid of the image tokens on either side; None where there are none."""
        return next((side.grid for side in (self.queries, self.keys) if "image" in side), None)

    def __contains__(self, name: str) -> bool:
        return name in self.queries or name in self.keys

    def with_texts(self, texts: Sequence[tuple[str, int]], pad: int = 0) -> Frame:
        """As `Layout.with_texts`, on the sides that hold the prompt."""
        queries = self.queries.with_texts(texts, pad)
        return Frame(queries, queries if self.is_joint else self.keys.with_texts(texts, pad))


@dataclass(frozen=True)
class Frames:
    """The frames of one forward by name; layers name theirs. The first is the one that reports speak of."""

    items: tuple[tuple[str, Frame], ...]

    @classmethod
    def of(cls, **frames: Frame) -> Frames:
        return cls(tuple(frames.items()))

    def __getitem__(self, name: str) -> Frame:
        return dict(self.items)[name]

    @property
    def main(self) -> Frame:
        return self.items[0][1]

    @property
    def ranges(self) -> dict[str, TokenRange]:
        """All ranges by name, at the sizes of the first frame that holds them."""
        found: dict[str, TokenRange] = {}
        for _, frame in self.items:
            for item in (*frame.queries.ranges, *frame.keys.ranges):
                found.setdefault(item.name, item)
        return found

    def with_texts(self, texts: Sequence[tuple[str, int]], pad: int = 0) -> Frames:
        """All frames after texts were appended to the prompt."""
        return Frames(tuple((name, frame.with_texts(texts, pad)) for name, frame in self.items))


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


@dataclass(frozen=True)
class Group:
    """Tokens that every control treats alike.

    Attributes:
        kind: "global" or "region_text" or "pad" (text), "image" (a cell of the picture), "reference", "register".
        index: number of the region (region_text) or of the reference; -1 otherwise.
        members: regions that hold these tokens; empty means uncovered, or a reference that is open to all.
        name: for messages and reports.
    """

    kind: Kind
    index: int = -1
    members: frozenset[int] = field(default_factory=frozenset)
    name: str = ""


def partition(layout: Layout, member: Tensor, regions: Sequence[Region]) -> tuple[Tensor, tuple[Group, ...]]:
    """Split the sequence into groups: one per text, reference and occurring combination of regions.

    Args:
        layout: the sequence; "text.region<r>" is the text of `regions[r]`.
        member: bool [R, image tokens], from `membership`.
        regions: R regions, for names and bound references.

    Returns:
        (atom int64 [tokens], groups): `groups[atom[t]]` holds token t.
    """
    atom = torch.empty(layout.tokens, dtype=torch.int64)
    groups: list[Group] = []

    def add(group: Group) -> int:
        groups.append(group)
        return len(groups) - 1

    for item in layout.ranges:
        if len(item) == 0:
            continue
        span = slice(item.start, item.stop)
        if item.name == "image":
            # a further column, alike for all, keeps `unique` content where there are no regions
            marked = torch.cat([member.T, torch.zeros(len(item), 1, dtype=torch.bool)], dim=1)
            cells, inverse = torch.unique(marked, dim=0, return_inverse=True)
            for cell in range(len(cells)):
                members = frozenset(cells[cell].nonzero().flatten().tolist())
                names = " + ".join(regions[r].label for r in sorted(members))
                atom[span][inverse == cell] = add(
                    Group("image", -1, members, f"image of {names}" if names else "background")
                )
        elif item.name.startswith("reference."):
            index = int(item.name.rpartition(".")[2])
            bound = frozenset(r for r, region in enumerate(regions) if region.reference == index)
            atom[span] = add(Group("reference", index, bound, f"reference {index}"))
        elif item.name.startswith("text.region"):
            index = int(item.name.removeprefix("text.region"))
            atom[span] = add(Group("region_text", index, frozenset([index]), f"text of {regions[index].label}"))
        elif item.name in ("text.pad", "registers"):
            kind: Kind = "pad" if item.name == "text.pad" else "register"
            atom[span] = add(Group(kind, name={"pad": "padding"}.get(kind, "registers")))
        else:
            atom[span] = add(Group("global", name="prompt"))
    return atom, tuple(groups)
