"""Compiled with full graphs: controls act, in no more graphs than the plain model needs, and compiled code is not passed over."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention_dispatch import attention_backend
from harness import DOORS, Setting, flux, regions
from torch._dynamo.testing import CompileCounter

import attnctrl as ac
from attnctrl.execute import Host
from attnctrl.tappable import is_compiled

slow = pytest.mark.slow


def stack() -> list[Any]:
    return [ac.Isolate(background="reads_all"), ac.Regions(regions(), base_ratio=0.2)]


def controlled(setting: Setting, door: Any = DOORS["attach"], **changes: Any) -> torch.Tensor:
    with door(setting.model, stack()):
        return setting.run(**changes)


@pytest.mark.parametrize("door", [DOORS["attach"], pytest.param(DOORS["processors"], marks=slow)], ids=DOORS)
def test_compiled_blocks_make_no_more_graphs_than_vanilla(door: Any) -> None:
    """Full graphs; layers with the same plan share one; hooks put on compiled code that has run are not passed over."""
    torch._dynamo.reset()
    counter, setting = CompileCounter(), Setting(tiny.flux(double=1, single=3), tiny.flux_inputs(), (4, 6), 5)
    controls = ac.Isolate(regions())
    base = setting.run()
    with door(setting.model, controls):
        expected = setting.run()
    setting.model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert (setting.run() - base).abs().max() < 1e-5
    vanilla = counter.frame_count
    assert vanilla < 4
    with door(setting.model, controls):
        assert (setting.run() - expected).abs().max() < 1e-5
    controlled_too = counter.frame_count
    assert controlled_too <= 2 * vanilla
    # everything is compiled now: off, on and off again take what is there
    assert (setting.run() - base).abs().max() < 1e-5
    with door(setting.model, controls):
        assert (setting.run() - expected).abs().max() < 1e-5
    assert counter.frame_count == controlled_too


def test_a_model_compiled_while_another_is_controlled_is_not_passed_over() -> None:
    """The registry is wrapped already when it is compiled, so nothing but the note of tapped models tells its code apart."""
    torch._dynamo.reset()
    counter, other = CompileCounter(), flux(seed=1)
    setting = Setting(tiny.flux(double=1, single=0), tiny.flux_inputs(), (4, 6), 5)
    controls = ac.Isolate(regions())
    with ac.attach(setting.model, controls):
        expected = setting.run()
    with ac.attach(other.model, controls):
        setting.model.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert (setting.run() - expected).abs().max() > 1e-2
        with ac.attach(setting.model, controls):
            assert (setting.run() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["forward", *(pytest.param(how, marks=slow) for how in ("compile", "torch.compile"))])
def test_whole_model_compiled(how: str) -> None:
    torch._dynamo.reset()
    counter, setting = CompileCounter(), Setting(tiny.flux(double=1, single=1), tiny.flux_inputs(), (4, 6), 5)
    expected, base, model = controlled(setting), setting.run(), setting.model
    if how == "forward":
        model.forward = torch.compile(model.forward, backend=counter, fullgraph=True)
    elif how == "compile":
        model.compile(backend=counter, fullgraph=True)
    else:
        setting.model = torch.compile(model, backend=counter, fullgraph=True)
    compiled = model._compiled_call_impl
    setting.run()
    assert counter.frame_count == 1
    assert (controlled(setting) - expected).abs().max() < 1e-5
    assert counter.frame_count == 2
    assert (setting.run() - base).abs().max() < 1e-5
    assert counter.frame_count == 2
    assert model._compiled_call_impl is compiled


def test_compiling_the_whole_model_under_controls_is_refused() -> None:
    torch._dynamo.reset()
    setting = flux()
    with ac.attach(setting.model, stack()):
        setting.model.compile(backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"Call model.compile\(\) or torch.compile\(model\) first"):
            setting.run()


def test_a_model_is_known_to_be_compiled_or_not() -> None:
    """What sits on the model's own call for controls is no compilation."""
    setting = flux()
    with ac.attach(setting.model, stack()):
        assert not is_compiled(setting.model)
        setting.model.compile_repeated_blocks(backend="eager")
        assert is_compiled(setting.model)


@pytest.mark.parametrize(("own", "compiled"), [(False, True), (True, False), (True, True)])
def test_own_kernels_are_counted_on_when_asked_for(own: bool, compiled: bool) -> None:
    """Only on a device, and only while the user has selected no other backend."""
    setting = flux()
    cuda = torch.device("cuda")
    if compiled:
        setting.model.compile_repeated_blocks(backend="eager")
    with ac.attach(setting.model, stack(), own_kernels=own) as handle:
        engine, _ = handle._parts[0]
        assert engine._host(torch.device("cpu")) == Host()
        assert engine._host(cuda) == (Host(own_kernels=True, compiling=compiled) if own else Host())
        with attention_backend("_native_math"):
            assert not engine._host(cuda).own_kernels
