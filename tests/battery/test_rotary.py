"""The rotary codec of each family, against what its processors give to the kernel."""

from __future__ import annotations

import pytest
import torch
from harness import FAMILIES, probe

from attnctrl.errors import LayoutError
from attnctrl.families import family_of
from attnctrl.rotary import Rotary

ROTARY = [name for name, make in FAMILIES.items() if family_of(make().model).rotary is not None]


def test_families_with_rotary_positions() -> None:
    assert {"flux", "flux2", "qwen", "chroma", "zimage", "wan"} <= set(ROTARY)


@pytest.mark.parametrize("name", ROTARY)
def test_equal_tokens_differ_by_the_turn_between_their_places(name: str) -> None:
    """All image tokens are given the same content, so keys of the first layer differ by their positions alone."""
    setting = FAMILIES[name]()
    family = family_of(setting.model)
    rotary = family.rotary(setting.model)
    latents = setting.inputs[family.hidden]
    if isinstance(latents, list):
        same = [torch.ones_like(one) * 0.7 for one in latents]
    else:
        same = torch.ones_like(latents) * 0.7
    with torch.no_grad(), probe() as calls:
        setting.run(**{family.hidden: same})
    words = setting.calls[0].queries.split()
    start = setting.text if words[0] == "text" else 0
    *frames, height, width = setting.grid
    count = height * width * (frames[0] if frames else 1)
    for states in (calls[0].query, calls[0].key):
        image = states[0, start : start + count].transpose(0, 1)  # [H, T, D]
        places = torch.cartesian_prod(*(torch.arange(float(size)) for size in (*frames, height, width)))
        shift = torch.zeros(count, len(rotary.axes))
        names = (("frame",) if frames else ()) + ("y", "x")
        shift[:, [rotary.axes.index(axis) for axis in names]] = places
        expected = rotary.turn(image[:, :1].expand(-1, count, -1), shift)
        assert (image - image[:, :1]).abs().max() > 1e-2
        torch.testing.assert_close(image, expected, atol=2e-5, rtol=1e-5)


def test_turning_adds_up_and_keeps_scores() -> None:
    rotary = Rotary(("picture", "y", "x"), (4, 6, 6))
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 5, 16, generator=generator).unbind(0)
    a, b = rotary.shift(y=1.25, x=-3.0), rotary.shift(picture=2.0, x=0.5)
    torch.testing.assert_close(rotary.turn(rotary.turn(key, a), b), rotary.turn(key, a + b))
    torch.testing.assert_close(rotary.turn(query, a) @ rotary.turn(key, a).mT, query @ key.mT)
    assert torch.equal(rotary.turn(key, rotary.shift()), key)
    # the first channels of an axis turn by one radian a step
    one = torch.zeros(1, 16)
    one[0, 4] = 1.0
    turned = rotary.turn(one, rotary.shift(y=1.0))
    assert turned[0, 4:6].tolist() == pytest.approx([torch.tensor(1.0).cos().item(), torch.tensor(1.0).sin().item()])


def test_wrong_axes_and_heads_are_named() -> None:
    rotary = Rotary(("y", "x"), (8, 8))
    with pytest.raises(LayoutError, match="axes y, x; found z"):
        rotary.shift(z=1)
    with pytest.raises(LayoutError, match=r"16 channels \(8, 8\) cannot turn heads of 32"):
        rotary.turn(torch.zeros(2, 32), rotary.shift())
