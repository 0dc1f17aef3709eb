"""Shared GroupNorms against StyleAligned's own way, pictures put side by side; and that its LayerNorm does nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import flux, traces, unet
from torch import Tensor, nn

import attnctrl as ac
from attnctrl.norms import pooled

OFF = {"match": (), "weight": 0.0}


@contextmanager
def side_by_side(model: nn.Module, group: int) -> Iterator[None]:
    """Every GroupNorm normalises each row side by side with the first one of its group, and cuts it off again."""

    def forward(module: nn.GroupNorm) -> Any:
        def normalised(x: Tensor) -> Tensor:
            first = x.unflatten(0, (-1, group))[:, :1].expand(-1, group, *x.shape[1:]).flatten(0, 1)
            both = torch.cat([first, x], dim=2).double()
            weight, bias = (one.double() for one in (module.weight, module.bias))
            out = torch.nn.functional.group_norm(both, module.num_groups, weight, bias, module.eps)
            return out[:, :, x.shape[2] :].to(x.dtype)

        return normalised

    norms = [one for one in model.modules() if isinstance(one, nn.GroupNorm)]
    for one in norms:
        one.forward = forward(one)
    try:
        yield
    finally:
        for one in norms:
            del one.forward


def test_statistics_are_those_of_both_pictures() -> None:
    """The closed form against the concatenation in float64; an identical other changes nothing; half precision holds."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 8, 5, 7, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 3.0]).view(
        2, 1, 1, 1, 1
    )
    norm = nn.GroupNorm(4, 8).double()
    for one in norm.parameters():
        nn.init.normal_(one, generator=generator)
    both = norm(torch.cat([y + 2, x], dim=2))[:, :, 5:]
    assert (pooled(x, y + 2, norm) - both).abs().max() < 1e-12
    assert (norm(x) - both).abs().max() > 0.1
    assert (pooled(x, x, norm) - norm(x)).abs().max() < 1e-12
    plain = nn.GroupNorm(4, 8, affine=False)
    assert (pooled(x, y, plain) - plain(torch.cat([y, x], dim=2))[:, :, 5:]).abs().max() < 1e-12
    large = (x * 300).half()
    assert pooled(large, large, nn.GroupNorm(4, 8).half()).isfinite().all()


def test_the_shared_layer_norm_of_the_paper_does_nothing() -> None:
    x, y = torch.randn(2, 6, 10, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = nn.LayerNorm(16).double()
    assert torch.equal(norm(torch.cat([y, x], dim=1))[:, 10:], norm(x))


@pytest.mark.parametrize("style", [OFF, {"weight": 2.0}], ids=["alone", "with AdaIN and keys"])
def test_a_whole_unet_is_that_of_pictures_side_by_side(style: Any) -> None:
    """Two branches of two pictures each; the anchors are the plain model's."""
    setting = unet(batch=4)
    base, before = setting.run(), traces(setting.model)
    with ac.attach(setting.model, ac.ShareStyle(norms=True, **style), branches=("uncond", "cond")) as handle:
        out = setting.run()
    with ac.attach(setting.model, ac.ShareStyle(**style), branches=("uncond", "cond")), side_by_side(setting.model, 2):
        expected = setting.run()
    assert (out - expected).abs().max() < 5e-5
    assert (out[1::2] - base[1::2]).abs().max() > 1e-2
    assert (out[::2] - base[::2]).abs().max() < 1e-5
    assert "GroupNorms pooled with those of the picture 1 before" in str(handle.report())
    assert traces(setting.model) == before
    assert torch.equal(setting.run(), base)


def test_half_the_strength_is_half_the_way_of_each_norm() -> None:
    setting, first = unet(batch=2), {}
    norm = next(one for one in setting.model.modules() if isinstance(one, nn.GroupNorm))
    control = ac.ShareStyle(norms=True, strength=0.25, **OFF)
    followed = norm.register_forward_hook(lambda module, inputs, output: first.update(x=inputs[0], plain=output))
    with ac.attach(setting.model, control, branches=("cond",)):
        # behind the hooks that are put on as the forward begins
        seen = setting.model.register_forward_pre_hook(
            lambda *_: first.update(last=norm.register_forward_hook(lambda m, i, output: first.update(out=output)))
        )
        setting.run()
    for one in (followed, seen, first["last"]):
        one.remove()
    expected = first["plain"][1].lerp(pooled(first["x"][1:], first["x"][:1], norm)[0], 0.25)
    assert (first["out"][1] - expected).abs().max() < 1e-5
    assert torch.equal(first["out"][0], first["plain"][0])


def test_off_and_refused() -> None:
    setting = unet(batch=2)
    base = setting.run()
    assert ac.ShareStyle(norms=True, strength=0.0).is_idle
    assert not ac.ShareStyle(norms=True, **OFF).is_idle
    with ac.attach(setting.model, ac.ShareStyle(norms=True, window=(0.5, 0.5)), branches=("cond",)):
        assert torch.equal(setting.run(), base)
    with pytest.raises(ac.ControlError, match="keeps nothing of GroupNorms"):
        ac.ShareStyle(norms=True, bank=ac.Bank())
    other = flux(batch=2)
    with (
        ac.attach(other.model, ac.ShareStyle(norms=True)),
        pytest.raises(ac.UnsupportedModelError, match="no GroupNorms"),
    ):
        other.run()
    broken = setting.model.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with (
        ac.attach(setting.model, ac.ShareStyle(norms=True), branches=("cond",)),
        pytest.raises(ZeroDivisionError),
    ):
        setting.run()
    broken.remove()
    assert torch.equal(setting.run(), base)
    setting.model.mid_block.compile(backend="eager")
    with (
        ac.attach(setting.model, ac.ShareStyle(norms=True), branches=("cond",)),
        pytest.raises(ac.UnsupportedModelError, match="compiled"),
    ):
        setting.run()
    assert not any(len(one._forward_hooks) for one in setting.model.modules() if isinstance(one, nn.GroupNorm))
