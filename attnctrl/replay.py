"""What a perturbed forward has in common with the prompt's, kept from the one and given back in the other.

Both are given the same, so all blocks before the first perturbed layer give the same. While the prompt's forward runs,
what the last of them give is kept, the prompt's rows of it; in the perturbed forward those blocks compute nothing. What
a model does between its blocks (residuals of a ControlNet, joining of streams) it does in both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from .nested import mapped, tensors_in
from .standin import standing_in

__all__ = ["Prefix", "Records", "Stretch", "recording", "replaying", "within"]

_PLAIN = (Tensor, int, float, bool, str, type(None))


@dataclass(frozen=True)
class Stretch:
    """Blocks of one list, or parts of one block, from the first one on, in forward order.

    Attributes:
        kept: those whose outputs are read by what follows: the last one; all of them where later blocks of the model
            read each, as in a UNet's way down.
        part: they are parts of one block.
    """

    blocks: tuple[str, ...]
    kept: tuple[str, ...]
    part: bool = False


@dataclass(frozen=True)
class Prefix:
    """What one perturbed forward need not compute.

    Attributes:
        of: all blocks of the model.
        reason: why there is nothing to leave out; "" where there is.
        layers: names of the attention layers in its blocks.
        tell: told after the forward what was left out.
    """

    stretches: tuple[Stretch, ...]
    of: int
    reason: str = ""
    layers: frozenset[str] = frozenset()
    tell: Callable[[str], None] = field(default=lambda text: None, compare=False)

    def say(self, left_out: Sequence[Stretch]) -> str:
        """A line for reports, of one entry for each block or part that was left out."""
        parts = sum(stretch.part for stretch in left_out)
        more = f" and {parts} part{'s' * (parts > 1)} of the next" if parts else ""
        return f"replayed {len(left_out) - parts} of {self.of} blocks{more}"


@dataclass(eq=False)
class Records:
    """What was kept of a forward.

    Attributes:
        rows: the prompt's rows.
        batch: rows of the forward in all.
        outputs: by block, of the prompt's rows.
        shapes: by the first block of each stretch, of the tensors that it was called with.
        calls: of each block that is watched.
    """

    rows: Sequence[int]
    batch: int
    outputs: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    def lack(self, prefix: Prefix) -> str:
        """Why they do not do for a forward; "" where they do."""
        for name in (name for stretch in prefix.stretches for name in (stretch.blocks[0], *stretch.kept)):
            if self.calls[name] != 1:
                return f"{name} ran {self.calls[name]} times in the prompt's forward"
        unknown = [name for stretch in prefix.stretches for name in stretch.kept if name not in self.outputs]
        return f"{unknown[0]} gives what cannot be cut into rows" if unknown else ""


@contextmanager
def recording(model: nn.Module, prefixes: Iterable[Prefix], rows: Sequence[int], batch: int) -> Iterator[Records]:
    """Keep what these prefixes want of the forward that runs meanwhile."""
    records = Records(rows, batch)
    stretches = [stretch for prefix in prefixes for stretch in prefix.stretches]
    heads, kept = {one.blocks[0] for one in stretches}, {name for one in stretches for name in one.kept}

    def run(name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        records.calls[name] += 1
        if name in heads:
            records.shapes[name] = _shapes((args, kwargs))
        out = original(*args, **kwargs)
        if name in kept and _known(out):
            records.outputs[name] = _own(out, lambda x: x[list(rows)] if x.ndim and len(x) == batch else x.clone())
        return out

    with standing_in((model.get_submodule(name), partial(run, name)) for name in heads | kept):
        yield records


@contextmanager
def replaying(model: nn.Module, prefix: Prefix, records: Records) -> Iterator[list[Stretch]]:
    """Blocks of the prefix give what was kept in the forward that runs meanwhile; for each that did, its stretch."""
    left_out: list[Stretch] = []
    fillers: dict[Stretch, Any] = {}
    parted = False

    def run(stretch: Stretch, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal parted
        # rows by themselves may be packed shorter than in their batch; from there on everything is computed
        parted = parted or (name == stretch.blocks[0] and _shapes((args, kwargs)) != records.shapes[name])
        if parted:
            return original(*args, **kwargs)
        left_out.append(stretch)
        # models may write into what blocks give them
        if name in stretch.kept:
            return _own(records.outputs[name], Tensor.clone)
        if stretch not in fillers:
            fillers[stretch] = _own(records.outputs[stretch.kept[-1]], Tensor.clone)
        return fillers[stretch]

    blocks = ((one, name) for one in prefix.stretches for name in one.blocks)
    with standing_in((model.get_submodule(name), partial(run, one, name)) for one, name in blocks):
        yield left_out


def within(module: nn.Module) -> list[nn.Module]:
    """A module and all in it, in no order: what `modules()` gives, in a fraction of its time."""
    found = [module]
    for one in found:
        # looking for an attribute would ask all classes of a module first
        if parts := one.__dict__["_modules"]:
            found += [part for part in parts.values() if part is not None]
    return found


def _own(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """Copies of all tensors; one that is there twice stays one, as what writes into it means both."""
    made: dict[int, Tensor] = {}

    def once(x: Tensor) -> Tensor:
        if id(x) not in made:
            made[id(x)] = copy(x)
        return made[id(x)]

    return mapped(once, value)


def _known(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    return isinstance(value, _PLAIN) or (type(value) in (dict, list, tuple) and all(map(_known, parts)))


def _shapes(value: Any) -> list[tuple[int, ...]]:
    """Shapes of the rows of all tensors."""
    return [tuple(one.shape[1:]) for one in tensors_in(value)]
