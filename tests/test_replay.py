"""What is kept of a forward and given back in another; which blocks stand before a layer."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import Tensor, nn

from attnctrl.families import family_of
from attnctrl.nested import mapped, tensors_in
from attnctrl.prefix import lists_of, stretches_before
from attnctrl.replay import Prefix, Stretch, recording, replaying, within


class Line(nn.Module):
    """Three blocks that add 1, 2 and 4, the second of which runs as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Add(1.0), _Add(2.0), _Add(4.0)])

    def forward(self, x: Tensor, again: int = 1) -> Tensor:
        for block in [self.blocks[0], *[self.blocks[1]] * again, self.blocks[2]]:
            x = block(x)
        return x


class _Add(nn.Module):
    def __init__(self, what: float) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        return x + self.what


@pytest.mark.parametrize("again", [0, 1, 2])
def test_blocks_that_a_forward_left_out_or_ran_twice_leave_no_record(again: int) -> None:
    """As caches outside of diffusers do."""
    model, x = Line(), torch.zeros(3, 2)
    prefix = Prefix((Stretch(("blocks.0", "blocks.1"), ("blocks.1",)),), 3)
    with recording(model, [prefix], [2], 3) as records:
        assert model(x, again)[0, 0] == 5 + 2 * again
    if again != 1:
        assert records.lack(prefix) == f"blocks.1 ran {again} times in the prompt's forward"
        return
    assert records.lack(prefix) == ""
    assert torch.equal(records.outputs["blocks.1"], torch.full((1, 2), 3.0))
    with replaying(model, prefix, records) as left_out:
        assert torch.equal(model(torch.full((1, 2), 9.0)), torch.full((1, 2), 7.0))
    assert left_out == [prefix.stretches[0]] * 2
    with replaying(model, prefix, records) as left_out:
        assert model(torch.zeros(1, 5))[0, 0] == 7
    assert left_out == []


def test_stretches_of_a_unet() -> None:
    """Of what the way up reads all is kept, elsewhere what the next block is given."""
    model = tiny.unet()
    down, middle = ("down_blocks.0", "down_blocks.1"), ("mid_block.resnets.0",)
    family, layers = family_of(model), family_of(model).layers(model)
    lists = lists_of(family, model, layers)
    found = {one.name: stretches_before(one, lists, family, model) for one in layers}
    inside = "{}.attentions.0.transformer_blocks.0.attn1"
    assert found[inside.format("down_blocks.1")] == (
        Stretch(down[:1], down[:1]),
        Stretch(("down_blocks.1.resnets.0",), ("down_blocks.1.resnets.0",), part=True),
    )
    assert found[inside.format("mid_block")] == (Stretch(down, down), Stretch(middle, middle, part=True))
    parts = ("resnets.0", "attentions.0", "resnets.1")
    parts = tuple(f"up_blocks.1.{name}" for name in parts)
    assert found["up_blocks.1.attentions.1.transformer_blocks.0.attn2"] == (
        Stretch(down, down),
        Stretch(("mid_block",), ("mid_block",)),
        Stretch(("up_blocks.0",), ("up_blocks.0",)),
        Stretch(parts, parts, part=True),
    )


def test_layer_1_stands_before_layer_10() -> None:
    model = tiny.flux(double=1, single=11)
    names = tuple(f"single_transformer_blocks.{number}" for number in range(10))
    family, layers = family_of(model), family_of(model).layers(model)
    layer = next(one for one in layers if (one.stack, one.index) == ("single", 10))
    double = ("transformer_blocks.0",)
    expected = (Stretch(double, double), Stretch(names, names[-1:]))
    assert stretches_before(layer, lists_of(family, model, layers), family, model) == expected


def test_tensors_are_changed_wherever_they_lie_and_nothing_else_is() -> None:
    one, two, three = (torch.tensor([float(number)]) for number in (1, 2, 3))
    size = torch.Size([4])
    value = {"a": [one, "text", None], "b": (two, {"c": 5}, size)}
    other = {"a": [three, "other", None], "b": (one, {"c": 6}, size)}
    assert [x.item() for x in tensors_in(value)] == [1.0, 2.0]
    found = mapped(lambda x, y: 10 * x + y, value, other)
    assert found == {"a": [torch.tensor([13.0]), "text", None], "b": (torch.tensor([21.0]), {"c": 5}, size)}
    assert found["b"][2] is size
    assert mapped(torch.neg, (one, None)) == (torch.tensor([-1.0]), None)
    with pytest.raises(ValueError, match="shorter"):
        mapped(torch.add, (one, two), (one,))


def test_within_is_all_modules() -> None:
    model = tiny.unet()
    assert set(within(model)) == set(model.modules())
