"""Functions in the place of modules' forwards: the later around the earlier, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnctrl.standin import standing_in

ONE = torch.ones(1)


def times(number):
    return lambda forward, x: number * forward(x)


def plus(number):
    return lambda forward, x: forward(x) + number


def test_the_later_goes_around_the_earlier():
    module = nn.Identity()
    with standing_in([(module, times(3)), (module, plus(1))]):
        assert module(ONE) == 4
        with standing_in([(module, times(10))]):
            assert module(ONE) == 40
        assert module(ONE) == 4
    assert module(ONE) == 1
    assert "forward" not in vars(module)


def test_what_stood_there_comes_back_after_an_error():
    module = nn.Identity()
    module.forward = own = lambda x: x + 5
    with standing_in([(module, times(2))]):
        assert module(ONE) == 12
    assert module.forward is own
    with pytest.raises(TypeError), standing_in([(module, times(2))]):
        module()
    assert module.forward is own
    with pytest.raises(AttributeError), standing_in([(module, times(2)), (object(), times(2))]):
        pass
    assert module.forward is own


def test_what_somebody_else_put_there_stays():
    module = nn.Identity()
    with standing_in([(module, times(2))]):
        module.forward = other = lambda x: x - 1
    assert module.forward is other
