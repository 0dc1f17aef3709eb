"""Perturbed maps: every closed form is its dense formula in float64, with masks, shared value heads, heads and tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from execute_tools import random_visibility
from torch import Tensor

from attnctrl import perturb
from attnctrl.act import Act
from attnctrl.controls.perturb import Kind, Perturbation
from attnctrl.errors import ControlError
from attnctrl.execute import as_bias, plan, sdpa

GRID = (3, 5)
TEXT = 4
TOKENS = TEXT + 15  # [text, image]
IMAGE = slice(TEXT, TOKENS)
HEADS, SHARED, WIDTH = 4, 2, 8
KINDS: tuple[Kind, ...] = ("identity", "uniform", "mean_query", "blur", "temperature", "max", "slerp")


def tensors(batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Four heads of queries over two of keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int) -> Tensor:
        return torch.randn(batch, heads, TOKENS, WIDTH, generator=generator, dtype=torch.float64)

    return normal(HEADS), normal(SHARED), normal(SHARED)


def masks() -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 1, TOKENS, generator=generator) > 0.3
    rows = torch.rand(2, 1, TOKENS, TOKENS, generator=generator) > 0.3
    return {
        "none": None,
        "keys": seen,
        "rows": rows | torch.eye(TOKENS, dtype=torch.bool),
        "soft": torch.randn(1, HEADS, TOKENS, TOKENS, generator=generator, dtype=torch.float64),
    }


def edit(kind: Kind, strength: float = 0.7, **changes: Any) -> Perturbation:
    picture = ((TEXT, GRID),)
    spans = ((TEXT, TOKENS),) if kind == "blur" else None
    fields = {"heads": None, "spans": spans, "pictures": picture, "sigma": 0.8, "temperature": 3.0, "within": False}
    return Perturbation(kind, strength, **{**fields, **changes})


def run(one: Perturbation, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, plans: Any = None) -> Tensor:
    act = Act([(None, plans)], (TOKENS, TOKENS), outputs=[(None, plans, None, (one,))])
    return act.run(q, k, v, mask, sdpa, None)


def gaussian(sigma: float) -> Tensor:
    """The blur of queries of the image, [15, 15], weight by weight; indices are reflected at the edges."""

    def axis(size: int) -> Tensor:
        reach = min(int(torch.tensor(6 * sigma).ceil()) // 2, size // 2)
        weights = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
        table = torch.zeros(size, size, dtype=torch.float64)
        for row in range(size):
            for step, weight in zip(range(-reach, reach + 1), weights / weights.sum(), strict=True):
                column = abs(row + step)
                table[row, column if column < size else 2 * (size - 1) - column] += weight
        return table

    return torch.kron(axis(GRID[0]), axis(GRID[1]))


def scores(q: Tensor, k: Tensor, bias: Tensor | float) -> Tensor:
    return q @ k.repeat_interleave(2, 1).mT / WIDTH**0.5 + bias


def dense_map(kind: Kind, q: Tensor, k: Tensor, bias: Tensor | float, meant: slice = slice(None)) -> Tensor:
    """The map that takes the place of softmax(scores), [B, H, N, N]."""
    plain = scores(q, k, bias)
    if kind == "identity":
        return torch.eye(TOKENS, dtype=torch.float64).expand_as(plain)
    if kind == "uniform":
        return (torch.zeros_like(plain) + bias).softmax(-1)
    if kind == "mean_query":
        return scores(q[:, :, meant].mean(2, keepdim=True).expand_as(q), k, bias).softmax(-1)
    if kind == "blur":
        blurred = q.clone()
        blurred[:, :, IMAGE] = gaussian(0.8) @ q[:, :, IMAGE]
        return scores(blurred, k, bias).softmax(-1)
    if kind == "temperature":
        return (scores(q, k, 0.0) / 3.0 + bias).softmax(-1)
    assert kind == "max"
    return torch.nn.functional.one_hot(plain.argmax(-1), TOKENS).double()


def dense_arc(q: Tensor, k: Tensor, bias: Tensor | float, u: float) -> Tensor:
    """Fisher-Rao: squares of the slerp between the square roots of A's rows and of the identity's."""
    root, eye = scores(q, k, bias).softmax(-1).sqrt(), torch.eye(TOKENS, dtype=torch.float64)
    angle = (root * eye).sum(-1, keepdim=True).acos()
    return (((1 - u) * angle).sin() / angle.sin() * root + (u * angle).sin() / angle.sin() * eye) ** 2


def dense(kind: Kind, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, u: float, **more: Any) -> Tensor:
    bias = 0.0 if mask is None else as_bias(mask, torch.float64)
    plain = scores(q, k, bias).softmax(-1)
    whole = dense_arc(q, k, bias, u) if kind == "slerp" else (1 - u) * plain + u * dense_map(kind, q, k, bias, **more)
    return torch.stack([plain, whole]) @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", masks().values(), ids=masks())
@pytest.mark.parametrize("u", [0.3, 1.0])
def test_every_kind_is_its_dense_formula(kind: Kind, mask: Tensor | None, u: float) -> None:
    q, k, v = tensors()
    plain, whole = dense(kind, q, k, v, mask, u)
    expected = whole if kind != "blur" else torch.cat([plain[:, :, :TEXT], whole[:, :, IMAGE]], 2)
    out = run(edit(kind, u), q, k, v, mask)
    assert (out - expected).abs().max() < 1e-12
    assert (out - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "calls"), [("identity", 0), ("max", 0), ("uniform", 1), ("temperature", 1), ("slerp", 1)]
)
def test_what_nobody_reads_is_not_executed(kind: Kind, calls: int) -> None:
    counted: list[Tensor] = []

    def kernel(*states: Tensor, **options: Any) -> Tensor:
        counted.append(states[0])
        return sdpa(*states, **options)

    for one, expected in ((edit(kind, 1.0), calls), (edit(kind, 0.7), calls + (kind != "slerp"))):
        counted.clear()
        act = Act([(None, None)], (TOKENS, TOKENS), outputs=[(None, None, None, (one,))])
        act.run(*tensors(), None, kernel, None)
        assert len(counted) == expected
    # unless somebody watches it
    told: list[Tensor] = []
    act = Act([(None, None)], (TOKENS, TOKENS), outputs=[(None, None, None, (edit(kind, 1.0),))])
    act.watched([SimpleNamespace(executed=told.append)]).run(*tensors(), None, kernel, None)  # type: ignore[list-item]
    assert torch.equal(told[0], sdpa(*tensors()))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_tokens_that_are_not_meant_keep_their_bits(kind: Kind) -> None:
    q, k, v = tensors()
    untouched = sdpa(q, k, v)
    out = run(edit(kind, heads=(1, 3), spans=((TEXT, TOKENS),)), q, k, v)
    assert torch.equal(out[:, ::2], untouched[:, ::2])
    assert torch.equal(out[:, :, :TEXT], untouched[:, :, :TEXT])
    more = {"meant": IMAGE} if kind == "mean_query" else {}
    expected = dense(kind, q, k, v, None, 0.7, **more)[1]
    assert (out[:, 1::2, IMAGE] - expected[:, 1::2, IMAGE]).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["identity", "uniform", "mean_query", "blur", "temperature"])
def test_what_other_controls_hide_stays_hidden(kind: Kind) -> None:
    """A table of log-weights adds to the scores of the perturbed map too; identity knows only itself."""
    q, k, v = tensors()
    table = random_visibility(TOKENS, TOKENS, 4, 4, 0, soft=True, joint=True)
    bias = table.dense(torch.float64)
    plain, whole = dense(kind, q, k, v, bias, 0.7)
    expected = whole if kind != "blur" else torch.cat([plain[:, :, :TEXT], whole[:, :, IMAGE]], 2)
    out = run(edit(kind), q, k, v, None, plan(table, executor="grouped"))
    assert (out - expected).abs().max() < 1e-12


@pytest.mark.parametrize("change", [{"kind": "max"}, {"kind": "slerp"}, {"kind": "identity", "within": True}])
def test_kinds_that_would_look_past_visibility_are_refused(change: dict[str, Any]) -> None:
    table = random_visibility(TOKENS, TOKENS, 4, 4, 0, soft=True, joint=True)
    with pytest.raises(ControlError, match="cannot keep to what other controls hide"):
        run(edit(**{"spans": ((TEXT, TOKENS),), **change}), *tensors(), None, plan(table, executor="grouped"))


@pytest.mark.parametrize("mask", [masks()["none"], masks()["keys"], masks()["soft"]], ids=["none", "keys", "soft"])
def test_identity_within_the_image_leaves_itself_and_the_text(mask: Tensor | None) -> None:
    """Scores between different tokens of the image are -inf; the own one is in sight whatever the mask says."""
    q, k, v = tensors()
    bias = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.float64) + (
        0 if mask is None else as_bias(mask, torch.float64)
    )
    image = bias[..., IMAGE, IMAGE]
    image.fill_(-torch.inf)
    image.diagonal(dim1=-2, dim2=-1).fill_(0)
    expected = (scores(q, k, bias).softmax(-1) @ v.repeat_interleave(2, 1))[:, :, IMAGE]
    out = run(edit("identity", 1.0, spans=((TEXT, TOKENS),), within=True), q, k, v, mask)
    assert (out[:, :, IMAGE] - expected).abs().max() < 1e-12
    bare = None if mask is None else as_bias(mask, torch.float64)
    assert torch.equal(out[:, :, :TEXT], sdpa(q, k, v, bare)[:, :, :TEXT])


def test_few_scores_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors()
    ones = [edit("max"), edit("slerp"), edit("identity", spans=((TEXT, TOKENS),), within=True)]
    whole = [run(one, q, k, v, masks()["rows"]) for one in ones]
    monkeypatch.setattr(perturb, "_CHUNK", 3 * 2 * HEADS * TOKENS)
    for one, before in zip(ones, whole, strict=True):
        assert (run(one, q, k, v, masks()["rows"]) - before).abs().max() < 1e-12


def test_identity_is_the_value_and_knows_no_query() -> None:
    """No way at all to queries and keys, exact zeros at other tokens' values; the values themselves to the bit."""
    q, k, v = (x.requires_grad_() for x in tensors())
    out = run(edit("identity", 1.0), q, k, v)
    assert torch.equal(out, v.repeat_interleave(2, 1))
    *others, to_values = torch.autograd.grad((out[:, :, 3] ** 2).sum(), (q, k, v), allow_unused=True)
    assert others == [None, None]
    touched = to_values.abs().amax((0, 1, 3))
    assert (touched > 0).nonzero().flatten().tolist() == [3]


def test_strength_0_is_the_output_to_the_bit_and_the_slope_is_the_difference() -> None:
    q, k, v = tensors()
    out, own = sdpa(q, k, v), perturb.own_value(v, HEADS)
    u = torch.zeros(2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    mixed = perturb.blend(out, own, u)
    assert torch.equal(mixed, out)
    weights = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    slope = torch.autograd.grad((mixed * weights).sum(), u)[0]
    assert (slope - ((own - out) * weights).sum((1, 2, 3), keepdim=True)).abs().max() < 1e-12


def test_a_strength_per_sample_reaches_its_sample_alone() -> None:
    q, k, v = tensors()
    out, own = sdpa(q, k, v), perturb.own_value(v, HEADS)
    u = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    mixed = perturb.blend(out, own, u)
    assert torch.equal(mixed, torch.stack([out[0], own[1]]))


def test_rows_of_a_batch_have_outputs_of_their_own() -> None:
    """The kernel runs once for all rows; a row without an output keeps its bits."""
    q, k, v = tensors(batch=3)
    calls = []

    def kernel(*parts: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        calls.append(len(parts[0]))
        return sdpa(*parts, mask, scale)

    first, second = (edit("identity", 1.0),), (edit("mean_query", 0.5),)
    rows = [torch.tensor([one]) for one in (2, 0, 1)]
    outputs = [(rows[0], None, None, first), (rows[1], None, None, ()), (rows[2], None, None, second)]
    out = Act([(None, None)], (TOKENS, TOKENS), outputs=outputs).run(q, k, v, None, kernel, None)
    assert calls == [3, 1]  # and one query of a mean
    assert torch.equal(out[0], sdpa(q, k, v)[0])
    assert torch.equal(out[2], v[2].repeat_interleave(2, 0))
    assert (out[1] - dense("mean_query", q, k, v, None, 0.5)[1][1]).abs().max() < 1e-12


def test_blurred_queries() -> None:
    q, k, v = tensors()
    pictures = ((TEXT, GRID),)
    assert torch.equal(perturb.blur_query(q, pictures, 1e-3), q)
    constant = q[:, :, :1].expand_as(q)
    assert (perturb.blur_query(constant, pictures, 2.0) - constant).abs().max() < 1e-14
    blurred = perturb.blur_query(q, pictures, 0.8)
    assert torch.equal(blurred[:, :, :TEXT], q[:, :, :TEXT])
    assert (scores(blurred, k, 0.0)[:, :, IMAGE] - gaussian(0.8) @ scores(q, k, 0.0)[:, :, IMAGE]).abs().max() < 1e-12
    film = perturb.blur_query(torch.cat([q[:, :, IMAGE]] * 2, 2), ((0, (2, *GRID)),), 0.8)
    assert (film - torch.cat([blurred[:, :, IMAGE]] * 2, 2)).abs().max() < 1e-14
    rows = run(edit("mean_query", 1.0), q, k, v)
    assert (rows - rows[:, :, :1]).abs().max() == 0


def test_half_precision_is_rounded_once() -> None:
    q, k, v = (x.to(torch.bfloat16) for x in tensors())
    out = sdpa(q, k, v)
    expected = (0.5 * out.float() + 0.5 * v.repeat_interleave(2, 1).float()).to(torch.bfloat16)
    assert torch.equal(run(edit("identity", 0.5), q, k, v), expected)
    for kind in KINDS:
        assert run(edit(kind), q, k, v).isfinite().all()


def test_heads_that_are_not_there_are_told() -> None:
    with pytest.raises(ControlError, match="no head 4: the layer has 4"):
        run(edit("identity", heads=(0, 4)), *tensors())
