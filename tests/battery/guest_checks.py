"""What is asserted of a guest: controls act as the formula says, or refuse with a remedy; leaving restores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from harness import Kernel, Setting, branches, dense, probe
from table import CASES
from test_battery import passes

import attnctrl as ac

CASE = CASES["stack"]

Enter = Callable[[Setting], AbstractContextManager[None]]
Check = Callable[["Guest", Setting], None]


def acts(guest: Guest, setting: Setting) -> None:
    """Controls come on a model that has the guest; one that changes no output without them changes none with them."""
    plain = setting.run()
    with attached(setting, CASE.scene()):
        expected = setting.run()
    with guest.enter(setting):
        base = setting.run()
        with attached(setting, scene := CASE.scene()) as handle:
            out, calls = run_probed(guest, setting)
            equals_formula(setting, scene, calls)
            assert (out - base).abs().max() > 1e-3
            assert (base - plain).abs().max() > 1e-5 or (out - expected).abs().max() < 1e-4
            assert all(one.forwards == 1 for one in handle.report().controls)
        assert torch.equal(setting.run(), base)


def acts_before(guest: Guest, setting: Setting) -> None:
    """The guest comes on a model that has controls."""
    base = setting.run()
    handle = attached(setting, scene := CASE.scene())
    with guest.enter(setting):
        out, calls = run_probed(guest, setting)
        equals_formula(setting, scene, calls)
        assert (out - base).abs().max() > 1e-3
        handle.detach()
        assert torch.equal(setting.run(), base)


def nested(guest: Guest, setting: Setting) -> None:
    """The parts of one stack come and leave one by one, in either order."""
    isolate, regional = CASE.controls(scene := CASE.scene())
    base = setting.run()
    with attached(setting, scene, [regional]):
        one = setting.run()
    for first in (0, 1):
        handles = [attached(setting, scene, [control]) for control in (regional, isolate)]
        _, calls = run_probed(guest, setting)
        equals_formula(setting, scene, calls)
        if first == 1:
            handles[1].detach()
            assert torch.equal(setting.run(), one)
            handles[0].detach()
        else:
            # isolation has its regions from the stack that leaves
            with pytest.warns(UserWarning, match="can no longer act: 'isolate' needs regions"):
                handles[0].detach()
            assert torch.equal(setting.run(), base)
            handles[1].detach()
        assert torch.equal(setting.run(), base)


def refused(message: str, *, before: bool = False) -> Check:
    """The check of an error with this text; `before`: the guest comes on a model that has controls."""

    def check(guest: Guest, setting: Setting) -> None:
        base = setting.run() if before else None
        handle = attached(setting, CASE.scene()) if before else None
        with guest.enter(setting):
            if handle is None:
                base = setting.run()
                handle = attached(setting, CASE.scene())
            # inside a compiler, the error comes as one of the compiler's
            with pytest.raises(Exception, match=message):
                setting.run()
            handle.detach()
            assert torch.equal(setting.run(), base)

    check.outcome = "refused"  # type: ignore[attr-defined]
    return check


@dataclass(frozen=True)
class Guest:
    """One guest.

    Attributes:
        enter: puts it on the setting's model for the length of a `with`.
        check: what is asserted with it.
        note: what a cell says besides.
        absent: by family, why there is no such thing.
        backend: the attention backend that is called.
        options: of the family's setting.
        gradients: forwards run with gradients enabled.
    """

    enter: Enter
    check: Check = acts
    note: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    backend: str = "native"
    options: dict[str, Any] = field(default_factory=dict)
    gradients: bool = False

    def outcome(self, family: str) -> tuple[str, str]:
        """What the table of the documentation says: a word, and a note or ""."""
        if family in self.absent:
            return "none", self.absent[family]
        return getattr(self.check, "outcome", "acts"), self.note

    def mode(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.gradients else torch.no_grad()


def attached(setting: Setting, scene: Sequence[Any], controls: Sequence[Any] | None = None) -> Any:
    stack = CASE.controls(scene) if controls is None else controls
    placed = [control if setting.layers is None else replace(control, layers=setting.layers) for control in stack]
    return ac.attach(setting.model, placed, branches=branches(setting.model))


def run_probed(guest: Guest, setting: Setting) -> tuple[torch.Tensor, list[Kernel]]:
    with probe(backend=guest.backend) as calls:
        out = setting.run()
    return out, calls


def equals_formula(
    setting: Setting, scene: Sequence[Any], calls: Sequence[Kernel], kinds: Sequence[Any] | None = None
) -> None:
    """Every kernel call equals the dense formula on the query, key and value that it got; those of others are plain."""
    for call, stand in zip(calls, setting.calls if kinds is None else kinds, strict=True):
        if stand is None:
            expected = call.plain()
        else:
            expected = dense(call.query, call.key, call.value, *passes(setting, CASE, scene, stand))
        assert (expected - call.out).abs().max() < tolerance(call.value)


def tolerance(value: torch.Tensor) -> float:
    """In half precision weights and sums are rounded, by a unit of the largest value each."""
    eps = torch.finfo(value.dtype).eps
    return 1e-5 if value.dtype == torch.float32 else 2 * eps * float(value.abs().max())
