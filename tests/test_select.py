"""Layers by name, range and preset."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from attnctrl.errors import SelectionError
from attnctrl.select import Layer, describe, select

LAYERS = [Layer(f"double_blocks.{i}.attn", "double", i) for i in range(3)]
LAYERS += [Layer(f"single_blocks.{i}.attn", "single", i) for i in range(12)]


def early(counts: Mapping[str, int]) -> str:
    return f"single:0-{counts['single'] // 2 - 1}"


def names(selector: object) -> list[str]:
    return [f"{layer.stack[0]}{layer.index}" for layer in select(LAYERS, selector, {"single-early": early})]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (None, ["d0", "d1", "d2", *(f"s{i}" for i in range(12))]),
        ("all", ["d0", "d1", "d2", *(f"s{i}" for i in range(12))]),
        ("double", ["d0", "d1", "d2"]),
        ("double:0-1", ["d0", "d1"]),
        ("single:1", ["s1"]),
        ("single:10", ["s10"]),
        ("single:0,2, 5-6", ["s0", "s2", "s5", "s6"]),
        ("single:0-11/4", ["s0", "s4", "s8"]),
        ("single_blocks.1.attn", ["s1"]),
        (["single:1", "double:2", "single:0-1"], ["d2", "s0", "s1"]),
        ("single/5", ["s0", "s5", "s10"]),
        ("all/4", ["d0", "s0", "s4", "s8"]),
        ("single-early/3", ["s0", "s3"]),
        ("not single", ["d0", "d1", "d2"]),
        ("not single:1-11", ["d0", "d1", "d2", "s0"]),
        ("not all/2", ["d1", *(f"s{i}" for i in range(1, 12, 2))]),
        (["not single", "single:0"], ["d0", "d1", "d2", "s0"]),
        ("single-early", ["s0", "s1", "s2", "s3", "s4", "s5"]),
    ],
)
def test_selectors(selector: object, expected: list[str]) -> None:
    assert names(selector) == expected


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            "singel",
            r"'singel' selects no layer. Did you mean 'single'\? There are double:0-2, single:0-11; presets single-early",
        ),
        ("single_blocks.1", "selects no layer.*Did you mean 'single_blocks.1"),
        ("single:12", "there is no single block 12. There are double:0-2, single:0-11"),
        ("single:10-12", "no single block 12"),
        ("single:-1", "no block number"),
        ("single:", "no block number"),
        ("single:a", "'a' is no block number"),
        ("single:5-3", "runs backwards"),
        ("triple:0", "'triple:0' selects no layer"),
        ("not all", "'not all' selects no layer: 'all' are all there are"),
        ("not singel", "'singel' selects no layer. Did you mean 'single'"),
        ("singel/2", "'singel' selects no layer"),
        ("single/0", "'single/0' selects no layer"),
        ([], "An empty list"),
        (["double", "nothing"], "'nothing' selects no layer"),
    ],
)
def test_what_matches_nothing_is_an_error(selector: object, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        names(selector)


def test_describe() -> None:
    assert describe([LAYERS[0], LAYERS[2], *LAYERS[3:6]]) == "double:0,2, single:0-2"
    assert describe([]) == "no layers"
