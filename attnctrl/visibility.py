"""Who may see whom: atoms of tokens and a small table of log-weights, never a tokens x tokens mask.

An atom is a set of tokens whose rows and columns of the mask agree:

    mask[q, k] = log_weight[query_atom[q], key_atom[k]]

Hard masks, soft masks, reference strength and region weights are all this one table (0 sees, -inf does not, log(w) sees
with weight w: the same as repeating those keys w times). Tables of several controls compose by adding log-weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from .errors import PlanError

__all__ = ["Visibility", "compose"]


@dataclass(frozen=True, eq=False)
class Visibility:
    """An attention mask as atoms and a table.

    Attributes:
        query_atom: int64 [Tq], the atom of each query token, in [0, Gq).
        key_atom: int64 [Tk], the atom of each key token, in [0, Gk); for joint attention the same object as
            `query_atom`.
        log_weight: float32 [Gq, Gk]; 0 sees, -inf does not, log(w) sees with weight w. Atoms may be empty.
        query_names, key_names: one name per atom, used in messages and reports.

    Raises:
        PlanError: when shapes, ids, names or values do not fit together.
    """

    query_atom: Tensor
    key_atom: Tensor
    log_weight: Tensor
    query_names: tuple[str, ...]
    key_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_atoms("query", self.query_atom, self.query_names)
        if not self.is_joint:
            _check_atoms("key", self.key_atom, self.key_names)
        expected = (len(self.query_names), len(self.key_names))
        if tuple(self.log_weight.shape) != expected or self.log_weight.dtype != torch.float32:
            found = f"{self.log_weight.dtype} {tuple(self.log_weight.shape)}"
            raise PlanError(f"log_weight must be torch.float32 {expected}, one entry per pair of atoms; found {found}.")
        if bool((self.log_weight.isnan() | (self.log_weight == float("inf"))).any()):
            raise PlanError("log_weight holds NaN or +inf; use 0 (sees), -inf (does not) or log(w) for a weight w > 0.")

    @classmethod
    def joint(cls, atom: Tensor, log_weight: Tensor, names: Sequence[str]) -> Visibility:
        """Self-attention of one sequence: `atom` int64 [T], `log_weight` [G, G] of any float dtype, G `names`."""
        names = tuple(names)
        return cls(atom, atom, log_weight.to(device=atom.device, dtype=torch.float32), names, names)

    @classmethod
    def open(cls, tokens: int, *, device: torch.device | str | None = None) -> Visibility:
        """Every one of `tokens` tokens sees every other: the unmasked attention."""
        atom = torch.zeros(tokens, dtype=torch.int64, device=device)
        return cls.joint(atom, torch.zeros(1, 1, device=device), ("all",))

    @property
    def is_joint(self) -> bool:
        """Queries and keys are the same tokens."""
        return self.query_atom is self.key_atom

    @property
    def query_counts(self) -> Tensor:
        """int64 [Gq]: tokens of each query atom."""
        return torch.bincount(self.query_atom, minlength=len(self.query_names))

    @property
    def key_counts(self) -> Tensor:
        """int64 [Gk]: tokens of each key atom."""
        return torch.bincount(self.key_atom, minlength=len(self.key_names))

    @property
    def nbytes(self) -> int:
        """Bytes held: 8 per token and side plus 4 per table entry."""
        atoms = [self.query_atom] if self.is_joint else [self.query_atom, self.key_atom]
        return sum(tensor.nbytes for tensor in [*atoms, self.log_weight])

    @property
    def is_open(self) -> bool:
        """Every occurring row is constant and finite, so the attention equals the unmasked one."""
        rows = self.log_weight[self.query_counts > 0][:, self.key_counts > 0]
        return bool((rows.isfinite() & (rows == rows[:, :1])).all())

    def density(self) -> float:
        """The share of (query, key) token pairs that see each other, in [0, 1]: the relative cost of the attention."""
        sees = self.log_weight.isfinite().to(torch.float64)
        pairs = self.query_counts.to(torch.float64) @ sees @ self.key_counts.to(torch.float64)
        return float(pairs) / max(1, self.query_atom.numel() * self.key_atom.numel())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The additive bias [Tq, Tk] in `dtype`. Takes Tq x Tk memory: for tests and the dense lowering only."""
        return self.log_weight.to(dtype)[self.query_atom][:, self.key_atom]

    def to(self, device: torch.device | str) -> Visibility:
        """The same visibility with its tensors on `device`."""
        query_atom = self.query_atom.to(device)
        key_atom = query_atom if self.is_joint else self.key_atom.to(device)
        return replace(self, query_atom=query_atom, key_atom=key_atom, log_weight=self.log_weight.to(device))

    def validate(self, active: Tensor | None = None) -> None:
        """Check that every occurring query atom sees a key that exists.

        Args:
            active: bool [Gq], the query atoms that are computed; None means all.

        Raises:
            PlanError: naming the atoms that see nothing. SDPA would return zeros or NaN for them, silently.
        """
        needs = self.query_counts > 0
        if active is not None:
            needs = needs & active.to(needs.device)
        sees = (self.log_weight.isfinite() & (self.key_counts > 0)).any(dim=1)
        blind = (needs & ~sees).nonzero().flatten().tolist()
        if blind:
            counts = self.query_counts.tolist()
            found = ", ".join(f"'{self.query_names[g]}' ({counts[g]} tokens)" for g in blind)
            empty = [self.key_names[g] for g, n in enumerate(self.key_counts.tolist()) if n == 0]
            note = f" Key atoms without tokens: {', '.join(empty)}." if empty else ""
            raise PlanError(
                f"Every query must see a key, but these see none: {found}.{note} "
                "Let them see at least themselves or a text, or remove a control that blocks them."
            )

    def reachable(self, blocks: int) -> Tensor:
        """Which atoms can influence which after `blocks` attention blocks with residuals.

        Returns:
            bool [G, G]: entry [i, j] says that a change in atom j can reach atom i (LAMIC: A^L > 0). Rows and columns
            of empty atoms are False.

        Raises:
            PlanError: for cross attention, where keys are not updated by the blocks.
        """
        return self._distances(blocks) <= blocks

    def paths(self, blocks: int) -> str:
        """A report of indirect influence over `blocks` blocks, one line per ordered pair of atoms without a direct
        edge.

        For example "region 1 can read region 2 through background in 2 blocks" or "region 1 cannot read region 2 in
        57 blocks".
        """
        reads = self._reads().tolist()
        distance = self._distances(blocks).tolist()
        occurs = [g for g, n in enumerate(self.query_counts.tolist()) if n > 0]
        lines = []
        for i in occurs:
            for j in occurs:
                if i == j or reads[i][j]:
                    continue
                if distance[i][j] > blocks:
                    lines.append(f"{self.query_names[i]} cannot read {self.query_names[j]} in {blocks} blocks")
                    continue
                relays, here = [], i
                while distance[here][j] > 1:
                    # any neighbour one step closer lies on a shortest path
                    here = next(g for g in occurs if reads[here][g] and distance[g][j] == distance[here][j] - 1)
                    relays.append(self.query_names[here])
                through = ", then ".join(relays)
                lines.append(
                    f"{self.query_names[i]} can read {self.query_names[j]} through {through} in {distance[i][j]} blocks"
                )
        return "\n".join(lines) if lines else "every atom reads every other directly"

    def _reads(self) -> Tensor:
        """bool [G, G]: direct edges between atoms that have tokens, plus each atom's own residual."""
        if not self.is_joint:
            raise PlanError(
                "Reachability over blocks needs joint attention, where the queries of one block are the keys of the "
                f"next; this is cross attention, {self.query_atom.numel()} queries over {self.key_atom.numel()} keys."
            )
        occurs = self.query_counts > 0
        edges = self.log_weight.isfinite() | torch.eye(len(occurs), dtype=torch.bool, device=occurs.device)
        return edges & occurs[:, None] & occurs[None, :]

    def _distances(self, blocks: int) -> Tensor:
        """int64 [G, G]: blocks that j needs to reach i; 0 for i = j, `blocks + 1` if it takes more."""
        if blocks < 0:
            raise PlanError(f"The number of blocks must not be negative; found {blocks}.")
        edges = self._reads()
        reached = edges & torch.eye(len(edges), dtype=torch.bool, device=edges.device)
        distance = torch.where(reached, 0, blocks + 1)
        for step in range(1, blocks + 1):
            grown = (edges.to(torch.float32) @ reached.to(torch.float32)) > 0
            new = grown & ~reached
            if not bool(new.any()):
                break
            distance[new] = step
            reached = grown
        return distance


def compose(*visibilities: Visibility) -> Visibility:
    """All given visibilities at once: atoms are the occurring combinations of atoms, log-weights add and -inf stays
    -inf.

    Raises:
        PlanError: when nothing is given or token counts differ.
    """
    if not visibilities:
        raise PlanError("compose needs at least one visibility; use Visibility.open(tokens) for unmasked attention.")
    return reduce(_compose_two, visibilities)


def _compose_two(first: Visibility, second: Visibility) -> Visibility:
    for side in ("query", "key"):
        found = [getattr(v, f"{side}_atom").numel() for v in (first, second)]
        if found[0] != found[1]:
            raise PlanError(
                f"Visibilities of one call must cover the same tokens; {side} tokens: {found[0]} and {found[1]}. "
                "Build all of them from the same layout."
            )
    query_atom, query_pairs = combine_atoms(first.query_atom, second.query_atom)
    query_names = _pair_names(query_pairs, first.query_names, second.query_names)
    if first.is_joint and second.is_joint:
        key_atom, key_pairs, key_names = query_atom, query_pairs, query_names
    else:
        key_atom, key_pairs = combine_atoms(first.key_atom, second.key_atom)
        key_names = _pair_names(key_pairs, first.key_names, second.key_names)
    log_weight = (
        first.log_weight[query_pairs[:, 0]][:, key_pairs[:, 0]]
        + second.log_weight.to(first.log_weight.device)[query_pairs[:, 1]][:, key_pairs[:, 1]]
    )
    return Visibility(query_atom, key_atom, log_weight, query_names, key_names)


def combine_atoms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Common refinement of two labellings int64 [T]: (atom int64 [T], occurring pairs int64 [G, 2], sorted)."""
    second = second.to(first.device)
    width = int(second.max()) + 1 if second.numel() else 1
    codes, atom = torch.unique(first * width + second, return_inverse=True)
    return atom, torch.stack([codes // width, codes % width], dim=1)


def _pair_names(pairs: Tensor, first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    """Names of combined atoms; a side with a single atom tells nothing and is left out."""

    def name(a: str, b: str) -> str:
        if len(second) == 1 or a == b:
            return a
        return b if len(first) == 1 else f"{a} & {b}"

    return tuple(name(first[i], second[j]) for i, j in pairs.tolist())


def _check_atoms(side: str, atom: Tensor, names: tuple[str, ...]) -> None:
    if atom.dtype != torch.int64 or atom.ndim != 1:
        raise PlanError(f"{side}_atom must be an int64 tensor [tokens]; found {atom.dtype} {tuple(atom.shape)}.")
    if not atom.numel():
        return
    low, high = int(atom.min()), int(atom.max())
    if low < 0 or high >= len(names):
        raise PlanError(f"{side}_atom must lie in [0, {len(names)}), the named atoms {names}; found {low}..{high}.")
