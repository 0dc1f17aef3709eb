"""Chooses the lowering of a visibility or of a mix of passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PlanError
from ..visibility import Visibility
from . import flex, grouped, packed
from .base import ExecutionPlan, Host, Pass
from .dense import DensePlan
from .flex import FlexPlan
from .grouped import GroupedPlan
from .terms import Terms, build_terms
from .untouched import UntouchedPlan
from .varlen import VarlenPlan, find_kernel
from .xformers_block import XformersPlan

EXECUTORS = ("auto", "untouched", "grouped", "varlen", "flex", "xformers", "dense")
SOFT = ("auto", "bias", "lse")

# Cost of a masked score pair over an unmasked one, and of one grouped call in score pairs. Measured on CPU (H 4, D 64,
# float32) by `python -m attnctrl.execute.bench --thresholds --threads 1`: grouped / dense take 1.3 / 1.4 ms at 256
# tokens and 9 classes, 2.1 / 1.5 ms at 17 classes, 2.9 / 5.7 ms at 512 tokens and 9 classes. More heads or rows make
# calls relatively cheaper, so the choice errs towards dense only where both are fast.
DENSE_COST = 1.1
CALL_COST = 5_000
# On CUDA a call is a few kernel launches, and a mask excludes the flash kernels: estimates, not measured.
DENSE_COST_CUDA = 1.5
CALL_COST_CUDA = 500_000
# Bytes moved for a copied token are worth so many score pairs of a flash kernel (4.8 TB/s of a data sheet and some 500
# TFLOP/s make it 200), and grouped calls copy theirs too: the same estimate for both, not measured.
COPY_COST_CUDA = grouped.ROWS_PER_CALL_CUDA
# FlexAttention's generated kernels against flash attention, per score pair. An estimate, not measured.
FLEX_COST_CUDA = 1.2
# A soft class costs a call per distinct log-weight where a bias costs DENSE_COST_CUDA once: worth it for few of them.
# An estimate, not measured. On a CPU one bias per key costs nothing, so the bias is always taken there.
MAX_LEVELS_CUDA = 4


def plan(
    passes: Visibility | Pass | Sequence[Visibility | Pass],
    *,
    executor: str = "auto",
    device: torch.device | str | None = None,
    host: Host = Host(),
    soft: str = "auto",
) -> ExecutionPlan:
    """Make the plan of one attention call.

        out[q] = sum_p weight_p[atom(q)] * softmax(q k^T * scale + W_p[atom(q), atom(k)]) v

    Args:
        passes: one visibility, or several passes to mix; their atoms may differ, their tokens may not.
        executor: "auto" chooses by estimated cost among untouched, grouped and dense, and, on CUDA where `host` lets
            it, varlen and flex. By name: "grouped", "dense" and "flex" are always possible, "untouched" only for open
            visibilities, "varlen" runs segment by segment where the device has no such kernel, "xformers" needs the
            package and hard rows.
        device: where the plan's index tensors live; None takes that of the first visibility. Index tensors and Python
            numbers are all made here, on the CPU, so that `run` neither branches on data nor waits for the device.
        host: what may be counted on where the plan runs; "auto" takes only calls of the given kernel otherwise.
        soft: how grouped calls weigh keys: "bias" adds a bias per key, "lse" merges one unmasked call per distinct
            log-weight, "auto" takes the second on CUDA where they are few and `host` lets it.

    Raises:
        PlanError: when tokens of the passes differ, weights do not sum to 1, a computed query sees no key, or the
            executor cannot honour the visibility; with the names of the atoms.
    """
    for asked, known, what in ((executor, EXECUTORS, "executor"), (soft, SOFT, "way of soft rows")):
        if asked not in known:
            raise PlanError(f"Unknown {what} {asked!r}; choose one of {', '.join(known)}.")
    given = [passes] if isinstance(passes, (Visibility, Pass)) else list(passes)
    whole = [Pass(one) if isinstance(one, Visibility) else one for one in given]
    terms = build_terms(whole)
    target = torch.device(device) if device is not None else whole[0].visibility.query_atom.device
    return _lower(terms, executor, target, host=host, soft=soft).to(target)


def _lower(terms: Terms, executor: str, device: torch.device, *, host: Host, soft: str) -> ExecutionPlan:
    reason = "asked for"
    if executor == "auto" and terms.is_open:
        executor = "untouched"
    if executor == "auto":
        executor, reason = choose(estimate(terms, device, host), terms)
    if executor == "untouched":
        return _untouched(terms)
    if executor == "dense":
        return DensePlan(terms, reason)
    if executor == "grouped":
        merges = MAX_LEVELS_CUDA if host.own_kernels and device.type == "cuda" else 0
        levels = {"auto": merges, "bias": 0, "lse": terms.key_atom.numel()}[soft]
        return GroupedPlan(terms, reason, device=device, max_levels=levels)
    if executor == "flex":
        return FlexPlan(terms, reason, device=device)
    return (VarlenPlan if executor == "varlen" else XformersPlan)(terms, reason, device=device)


def _untouched(terms: Terms) -> UntouchedPlan:
    if not terms.is_open:
        raise PlanError(
            f"Executor 'untouched' was asked for, but {len(terms.classes)} classes of queries at density "
            f"{terms.density:.2f} need a mask; use executor 'auto', 'grouped' or 'dense'."
        )
    return UntouchedPlan(terms, "every query sees every key alike: the kernel gets the given tensors")


def choose(costs: dict[str, float], terms: Terms) -> tuple[str, str]:
    """The cheapest executor of `estimate`, and why; equal costs go to the one named first."""
    best = min(costs, key=lambda name: costs[name])
    calls = f"{len(terms.classes)} grouped calls"
    if best == "dense":
        share = costs["dense"] / costs["grouped"]
        return best, f"one masked call is estimated at {share:.2f} of {calls} (few tokens or many small classes)"
    share = costs[best] / costs["dense"]
    if best == "grouped":
        return best, f"calls per class are estimated at {share:.2f} of a dense mask"
    kind = "one packed call" if best == "varlen" else "one compiled block-sparse call"
    against = f"{costs[best] / costs['grouped']:.2f} of {calls}"
    return best, f"{kind} is estimated at {share:.2f} of a dense mask and {against}"


def estimate(terms: Terms, device: torch.device | str | None = None, host: Host = Host()) -> dict[str, float]:
    """Estimated costs of a call, in unmasked score pairs, of the executors that are worth choosing on a device."""
    device = torch.device(device or "cpu")
    call, masked = (CALL_COST, DENSE_COST) if device.type == "cpu" else (CALL_COST_CUDA, DENSE_COST_CUDA)
    pairs, calls = grouped.cost(terms, device)
    queries = sum(one.queries.numel() for one in terms.classes)
    costs = {"grouped": pairs + call * calls, "dense": masked * queries * terms.tokens[1] + call}
    if host.own_kernels and find_kernel(device, soft=any(one.is_soft for one in terms.classes)) is not None:
        costs["varlen"] = sum(one.pairs for one in terms.classes) + COPY_COST_CUDA * packed.copied(terms) + call
    if host.own_kernels and host.compiling and device.type == "cuda":
        costs["flex"] = FLEX_COST_CUDA * flex.block_pairs(terms) + COPY_COST_CUDA * sum(terms.tokens) + call
    return costs
