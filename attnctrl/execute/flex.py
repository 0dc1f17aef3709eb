"""The lowering on FlexAttention: one block-sparse kernel per layer of passes, for compiled models.

Tokens are put into an order in which those of a row and of an atom follow each other, so that most blocks of 128 x 128
are empty or full; which ones follows from the atoms that each block holds and the table of rows, never from a mask:

    empty = no atom pair of the block sees,  full = all do

Everything that changes with strengths is read from tensors inside the mask and score functions, so new numbers need no
new kernel. Without torch.compile FlexAttention computes the whole score matrix: exact, but slow and Tq x Tk in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .base import ExecutionPlan, Kernel
from .grouped import GroupedPlan, sort_keys
from .layers import deal, run_layers
from .lse import records_gradients
from .terms import Terms
from .tokens import tensor_bytes, token_set

BLOCK = 128


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which blocks of queries and keys see each other: bool [query blocks, key blocks] twice.

    Attributes:
        some: a pair of tokens of the block sees.
        full: all pairs do, and the block is not cut off by the end of a sequence.
    """

    some: Tensor
    full: Tensor

    @property
    def pairs(self) -> int:
        """Score pairs that a block-sparse kernel computes."""
        return int(self.some.sum()) * BLOCK * BLOCK


def occupancy(rows: Tensor, row_of: Tensor, key_atom: Tensor, block: int = BLOCK) -> Blocks:
    """Blocks from the rows and atoms that each block of tokens holds.

    Args:
        rows: float32 [R, G] log-weights.
        row_of: int64 [Tq], the row of each query.
        key_atom: int64 [Tk], the atom of each key.
        block: tokens per block.
    """
    sees = rows.isfinite().float()
    queries, keys = _present(row_of, len(rows), block), _present(key_atom, rows.shape[1], block)
    some = queries @ sees @ keys.T > 0
    blocked = queries @ (1 - sees) @ keys.T > 0
    whole_queries = torch.arange(1, len(queries) + 1, device=rows.device) * block <= row_of.numel()
    whole_keys = torch.arange(1, len(keys) + 1, device=rows.device) * block <= key_atom.numel()
    return Blocks(some, some & ~blocked & whole_queries[:, None] & whole_keys)


def make_block_mask(rows: Tensor, row_of: Tensor, key_atom: Tensor) -> BlockMask:
    """The BlockMask of some queries, [1, 1, Tq, Tk]; arguments as for `occupancy`."""
    blocks = occupancy(rows, row_of, key_atom)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rows[row_of[query], key_atom[key]] > float("-inf")

    return BlockMask.from_kv_blocks(
        *_listed(blocks.some & ~blocks.full),
        *_listed(blocks.full),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(row_of.numel(), key_atom.numel()),
    )


class FlexPlan(ExecutionPlan):
    """One call of FlexAttention per layer, in the order of rows and atoms.

    A mask of the model goes through grouped calls instead, and so do gradients on the CPU, which FlexAttention does not
    have. Block masks are made with the plan and hold (T / 128)^2 numbers.

    Args:
        terms: the classes.
        reason: why this executor was chosen.
        device: where the plan will run.
    """

    executor = "flex"

    def __init__(self, terms: Terms, reason: str, *, device: torch.device | str | None = None) -> None:
        super().__init__(density=terms.density, classes=len(terms.classes), tokens=terms.tokens, reason=reason)
        order = sort_keys(terms)
        self._keys = token_set(order)
        self._rows = torch.stack([one.row for one in terms.classes])
        self._key_atom = terms.key_atom[order]
        self._layers = deal(terms, by_row=True)
        self._soft = any(one.is_soft for one in terms.classes)
        self._grouped = GroupedPlan(terms, "in place of a block-sparse call", device=device)
        self._shares = _shares([occupancy(self._rows, layer.row_of, self._key_atom) for layer in self._layers])
        self._prepare()

    def _prepare(self) -> None:
        """Make what FlexAttention takes from the tensors of this device."""
        tables = [(self._rows, layer.row_of, self._key_atom) for layer in self._layers]
        self._masks = tuple(make_block_mask(*table) for table in tables)
        self._weighting = tuple(_weighting(*table) if self._soft else None for table in tables)

    @property
    def nbytes(self) -> int:
        """Bytes of atoms, rows, block masks and the grouped calls."""
        blocks = [x for mask in self._masks for x in mask.as_tuple() if isinstance(x, Tensor)]
        held = tensor_bytes([self._rows, self._key_atom, *blocks]) + sum(layer.nbytes for layer in self._layers)
        return held + self._keys.nbytes + self._grouped.nbytes

    def explain(self) -> str:
        """See `ExecutionPlan.explain`; with the share of blocks that are computed, and of those that need the mask."""
        return f"{super().explain()}; {self._shares}"

    def to(self, device: torch.device | str) -> FlexPlan:
        """The same plan on `device`."""
        moved = copy.copy(self)
        moved._keys, moved._rows = self._keys.to(device), self._rows.to(device)
        moved._key_atom = self._key_atom.to(device)
        moved._layers = tuple(layer.to(device) for layer in self._layers)
        moved._grouped = self._grouped.to(device)
        moved._prepare()
        return moved

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: Kernel, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        if bias is not None or (query.device.type != "cuda" and records_gradients(query, key, value)):
            return self._grouped._attend(query, key, value, kernel, scale, bias)
        keys, values = self._keys.take(key), self._keys.take(value)

        def attend(number: int, part: Tensor) -> Tensor:
            return flex_attention(
                part,
                keys,
                values,
                score_mod=self._weighting[number],
                block_mask=self._masks[number],
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )

        return run_layers(self._layers, query, value.shape[-1], attend)


def block_pairs(terms: Terms) -> int:
    """Score pairs that the plan of these classes computes, whole blocks counted."""
    rows = torch.stack([one.row for one in terms.classes])
    key_atom = terms.key_atom[sort_keys(terms)]
    return sum(occupancy(rows, layer.row_of, key_atom).pairs for layer in deal(terms, by_row=True))


def _shares(layers: Sequence[Blocks]) -> str:
    total = sum(blocks.some.numel() for blocks in layers)
    some, full = (sum(int(x.sum()) for x in side) for side in zip(*((b.some, b.full) for b in layers), strict=True))
    return f"{some / total:.2f} of the {BLOCK} x {BLOCK} blocks, {(some - full) / total:.2f} partial"


def _weighting(rows: Tensor, row_of: Tensor, key_atom: Tensor) -> Callable[..., Tensor]:
    """The score function that adds log-weights."""

    def add(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[row_of[query], key_atom[key]]

    return add


def _present(labels: Tensor, count: int, block: int) -> Tensor:
    """float32 [blocks, count]: 1 where a block of tokens holds a label."""
    blocks = -(-labels.numel() // block)
    block_of = torch.arange(labels.numel(), device=labels.device) // block
    found = torch.zeros(blocks * count, device=labels.device)
    found.index_fill_(0, block_of * count + labels, 1.0)
    return found.view(blocks, count)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool [rows, columns], per row how many columns are chosen, and their numbers first: int32 [1, 1, rows] and
    [1, 1, rows, columns]."""
    columns = torch.argsort(chosen.int(), dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]
