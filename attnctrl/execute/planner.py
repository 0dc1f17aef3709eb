"""Chooses the lowering of a visibility or of a mix of passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import PlanError
from ..visibility import Visibility
from . import grouped
from .base import ExecutionPlan, Pass
from .dense import DensePlan
from .grouped import GroupedPlan
from .terms import Terms, build_terms
from .untouched import UntouchedPlan

EXECUTORS = ("auto", "untouched", "grouped", "dense")

# Cost of a masked score pair over an unmasked one, and of one grouped call in score pairs. Measured on CPU (H 4, D 64,
# float32) by `python -m attnctrl.execute.bench --thresholds --threads 1`: grouped / dense take 1.3 / 1.4 ms at 256
# tokens and 9 classes, 2.1 / 1.5 ms at 17 classes, 2.9 / 5.7 ms at 512 tokens and 9 classes. More heads or rows make
# calls relatively cheaper, so the choice errs towards dense only where both are fast.
DENSE_COST = 1.1
CALL_COST = 5_000
# On CUDA a call is a few kernel launches, and a mask excludes the flash kernels: estimates, not measured.
DENSE_COST_CUDA = 1.5
CALL_COST_CUDA = 500_000


def plan(
    passes: Visibility | Pass | Sequence[Visibility | Pass],
    *,
    executor: str = "auto",
    device: torch.device | str | None = None,
) -> ExecutionPlan:
    """Make the plan of one attention call.

        out[q] = sum_p weight_p[atom(q)] * softmax(q k^T * scale + W_p[atom(q), atom(k)]) v

    Args:
        passes: one visibility, or several passes to mix; their atoms may differ, their tokens may not.
        executor: "auto" chooses by estimated cost; "grouped" and "dense" are always possible, "untouched" only for
            open ones.
        device: where the plan's index tensors live; None takes that of the first visibility. Index tensors and Python
            numbers are all made here, on the CPU, so that `run` neither branches on data nor waits for the device.

    Raises:
        PlanError: when tokens of the passes differ, weights do not sum to 1, a computed query sees no key, or the
            executor cannot honour the visibility; with the names of the atoms.
    """
    if executor not in EXECUTORS:
        raise PlanError(f"Unknown executor {executor!r}; choose one of {', '.join(EXECUTORS)}.")
    given = [passes] if isinstance(passes, (Visibility, Pass)) else list(passes)
    whole = [Pass(one) if isinstance(one, Visibility) else one for one in given]
    terms = build_terms(whole)
    target = torch.device(device) if device is not None else whole[0].visibility.query_atom.device
    return _lower(terms, executor, target).to(target)


def _lower(terms: Terms, executor: str, device: torch.device) -> ExecutionPlan:
    if executor == "untouched" or (executor == "auto" and terms.is_open):
        if not terms.is_open:
            raise PlanError(
                f"Executor 'untouched' was asked for, but {len(terms.classes)} classes of queries at density "
                f"{terms.density:.2f} need a mask; use executor 'auto', 'grouped' or 'dense'."
            )
        return UntouchedPlan(terms, "every query sees every key alike: the kernel gets the given tensors")
    if executor == "grouped":
        return GroupedPlan(terms, "asked for", device=device)
    if executor == "dense":
        return DensePlan(terms, "asked for")
    exact, dense = estimate(terms, device)
    if dense < exact:
        reason = f"one masked call is estimated at {dense / exact:.2f} of {len(terms.classes)} grouped calls"
        return DensePlan(terms, f"{reason} (few tokens or many small classes)")
    return GroupedPlan(terms, f"calls per class are estimated at {exact / dense:.2f} of a dense mask", device=device)


def estimate(terms: Terms, device: torch.device | str | None = None) -> tuple[float, float]:
    """Estimated costs (grouped, dense) of a call, in unmasked score pairs."""
    on_cpu = torch.device(device or "cpu").type == "cpu"
    call, masked = (CALL_COST, DENSE_COST) if on_cpu else (CALL_COST_CUDA, DENSE_COST_CUDA)
    pairs, calls = grouped.cost(terms, device)
    return pairs + call * calls, masked * sum(one.queries.numel() for one in terms.classes) * terms.tokens[1] + call
