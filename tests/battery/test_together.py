"""Layout, cast and style in one run: each keeps what it promises alone, in every layer of a batch of three pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from harness import Kernel, Kinds, Setting, Token, branches, flux, probe, sd3, tokens, unet, weights
from table import isolating, regional
from test_style import matched, rotation, turned
from torch import Tensor

import attnctrl as ac
from attnctrl.families import family_of
from attnctrl.select import select

LAYERS = {
    "flux": (flux, "single", "double"),
    "sd3": (sd3, "joint:0", "joint:1"),
    "unet": (unet, "up.self", "down.self"),
}
ODDS = 2.0


def subject(name: str, number: int, box: Any) -> ac.Region:
    return ac.Region(name, name=name, box=box, prompt_embeds=tiny.embeds(number, 2))


SCENES = [
    [subject("fox", 0, (0, 0, 2 / 6, 1)), subject("owl", 1, (4 / 6, 0, 1, 1))],
    [subject("owl", 2, (0, 0, 2 / 6, 1)), subject("fox", 3, (3 / 6, 0, 1, 0.5))],
    [subject("fox", 4, (0, 0, 1, 0.5)), subject("bear", 5, (0, 0.5, 2 / 6, 1))],
]


def names(picture: int, token: Token) -> frozenset[str]:
    return frozenset(SCENES[picture][r].name for r in token.members)


def shared_weight(kind: str, q: frozenset[str], k: frozenset[str]) -> float:
    """Isolation parts subjects of different names; the cast reads its namesakes, the style everything."""
    parted = bool(q and k and not q & k)
    return {"style": ODDS * (not parted), "cast": float(bool(q & k)), "": 0.0}[kind]


def reading(kind: str, row: int) -> tuple[int, ...]:
    return {"style": (0,) if row else (), "cast": tuple(n for n in range(3) if n != row), "": ()}[kind]


def table_of(setting: Setting, kinds: Kinds, row: int, kind: str) -> tuple[list[Token], list[tuple[int, int]], Tensor]:
    """The queries of a row, (row, number) of the keys that they might see, and with which weight they do."""
    queries, keys = (
        tokens(setting, SCENES[row], texts=True, kinds=side, grid=kinds.grid) for side in (kinds.queries, kinds.keys)
    )
    parts = [weights(queries, keys, regional("background"), isolating("isolated"))]
    found = [(row, n) for n in range(len(keys))]
    for other in reading(kind, row):
        theirs = tokens(setting, SCENES[other], texts=True, kinds=kinds.keys, grid=kinds.grid)
        image = [n for n, token in enumerate(theirs) if token.kind == "image"]
        more = [
            [float(q.kind == "image") * shared_weight(kind, names(row, q), names(other, theirs[n])) for n in image]
            for q in queries
        ]
        parts.append(torch.tensor(more, dtype=torch.float64))
        found += [(other, n) for n in image]
    return queries, found, torch.cat(parts, 1)


def formula(setting: Setting, call: Kernel, kinds: Kinds, row: int, kind: str) -> Tensor:
    """float64 [T, H, D]: AdaIN to row 0 where the style acts, then one softmax over all that is seen."""
    queries, found, table = table_of(setting, kinds, row, kind)
    query, key = call.query[row].double().clone(), call.key.double()
    own = key[row].clone()
    if kind == "style" and row:
        image = torch.tensor([token.kind == "image" for token in queries])
        turning = rotation(setting) if hasattr(setting.model.config, "axes_dims_rope") else None
        for mine, first in ((query, call.query[0].double()), (own, key[0])):
            x, y = mine[image], first[image]
            if turning is not None:
                x, y = turned(x, turning.conj()), turned(y, turning.conj())
            mine[image] = matched(x, y) if turning is None else turned(matched(x, y), turning)
    keys = torch.stack([own[n] if other == row else key[other, n] for other, n in found])
    values = torch.stack([call.value[other, n].double() for other, n in found])
    scores = torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5 + table.log()
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def run(family: str, *, grad: bool = False) -> tuple[Setting, list[tuple[Kernel, Kinds, str]], Tensor]:
    """A batch of three under all controls; its calls, each with what is shared there; and its output."""
    make, style, cast = LAYERS[family]
    setting = make(batch=3)
    stack = [
        ac.Regions(SCENES),
        ac.Isolate(),
        ac.ShareStyle(layers=style, weight=ODDS),
        ac.Share(layers=cast, tokens="subject", queries="same"),
    ]
    with ac.attach(setting.model, stack, branches=branches(setting.model)), probe(grad=grad) as calls:
        out = setting.run()
    described = family_of(setting.model)
    layers = described.layers(setting.model)
    chosen = {
        layer.name: kind
        for kind, selector in (("style", style), ("cast", cast))
        for layer in select(layers, selector, described.presets)
    }
    met = zip(layers, setting.controlled(calls), strict=True)
    return setting, [(call, kinds, chosen.get(layer.name, "")) for layer, (call, kinds) in met], out


@pytest.mark.parametrize("family", LAYERS)
def test_all_three_are_one_dense_formula_in_every_layer(family: str) -> None:
    setting, met, _ = run(family)
    assert {kind for *_, kind in met} >= {"style", "cast"}
    for call, kinds, kind in met:
        for row in range(3):
            expected = formula(setting, call, kinds, row, kind)
            assert (expected - call.out[row]).abs().max() < 2e-5, (kinds, kind, row)


def influences(setting: Setting, met: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(what is shared, whether a group of queries may see each key of the batch, whether it is moved by its value)."""
    for call, kinds, kind in met:
        for row in range(3):
            queries, found, table = table_of(setting, kinds, row, kind)
            for group in dict.fromkeys(queries):
                mine = torch.tensor([token == group for token in queries])
                (grad,) = torch.autograd.grad(call.out[row, mine].double().sum(), call.value, retain_graph=True)
                sees = torch.zeros(call.value.shape[:2], dtype=torch.bool)
                for (other, n), weight in zip(found, table[mine][0].tolist(), strict=True):
                    sees[other, n] |= weight > 0
                yield kind, sees, (grad != 0).flatten(2).any(-1)


@pytest.mark.parametrize("family", LAYERS)
def test_what_is_parted_has_no_influence_and_what_is_shared_has(family: str) -> None:
    """By gradients, of each kind of tokens in each layer: isolation and texts of regions within a picture and across,
    namesakes alone in the layers of the cast, the anchor's image tokens in those of the style."""
    setting, met, _ = run(family, grad=True)
    across = dict.fromkeys(("style", "cast"), 0)
    for kind, sees, moved in influences(setting, met):
        assert torch.equal(sees, moved)
        if kind:
            across[kind] += int(sees.any(1).sum()) - 1
    assert min(across.values()) > 0


def test_a_layer_in_which_two_controls_share_is_refused() -> None:
    setting = flux(batch=3)
    stack = [ac.ShareStyle(), ac.Share(SCENES, layers="double", tokens="subject", queries="same")]
    with ac.attach(setting.model, stack), pytest.raises(ac.ControlError, match="both share pictures in one layer"):
        setting.run()
