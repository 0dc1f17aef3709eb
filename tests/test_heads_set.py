"""Sets of heads: the file, what `Perturb` takes of it, the model that it belongs to, and batches with a set of each."""

from __future__ import annotations

import functools
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_pipes
import torch
from test_perturb import HEADS, dense, edit, run, tensors
from torch import Tensor

import attnctrl as ac
from attnctrl.bank.identity import identity_of
from attnctrl.headset import HeadSet
from attnctrl.scenecheck import control_schema

SOME = {"heads": [("joint:1", 1), ("joint:0", 0)], "strength": [0.5, 0.25], "scale": 5.0, "window": (0.0, 0.5)}


@functools.cache
def pipeline() -> Any:
    return tiny_pipes.sd3()


def draw(controls: Any = None, rows: int = 1, steps: int = 2) -> Tensor:
    generators = [torch.Generator().manual_seed(0) for _ in range(rows)]
    size = {"height": 32, "width": 48, "output_type": "latent", "max_sequence_length": 16, "guidance_scale": 3.0}
    with ac.attach(pipeline(), controls) if controls is not None else nullcontext():
        return pipeline()(["a red circle"] * rows, num_inference_steps=steps, generator=generators, **size).images


def test_a_file_gives_back_the_set_and_equal_pictures(tmp_path: Path) -> None:
    one = HeadSet(**SOME, model=identity_of(pipeline().transformer))
    path = one.save(tmp_path / "deep" / "heads.json")
    assert HeadSet.load(path) == one
    assert json.loads(path.read_text())["heads"] == [["joint:1", 1], ["joint:0", 0]]
    told = draw(ac.Perturb(heads=one))
    assert torch.equal(draw(ac.Perturb(heads=str(path))), told)
    assert torch.equal(draw(ac.Perturb(heads=path)), told)
    assert (told - draw()).abs().max() > 1e-3


def test_what_is_given_beside_a_set_comes_first() -> None:
    one = HeadSet(**SOME)
    plain = ac.Perturb(heads=one)
    assert (plain.kind, plain.strength, plain.scale, plain.window) == ("identity", 0.5, 5.0, (0.0, 0.5))
    assert plain.layers == ("joint:1", "joint:0")
    # also a value that would be the default
    other = ac.Perturb("uniform", heads=one, scale=3.0, window=(0.0, 1.0))
    assert (other.kind, other.strength, other.scale, other.window) == ("uniform", 0.5, 3.0, (0.0, 1.0))
    # the strongest head has the strength that is given, the others their share of it
    assert ac.Perturb(heads=one, strength=1.0).sets[0].strength == (1.0, 0.5)
    assert ac.Perturb(heads=one.changed(strength=0.5), strength=0.25).sets[0].strength == 0.25
    assert ac.Perturb(heads=one, strength=0.0).is_idle
    assert ac.Perturb(heads=one, scale=0.0).is_idle
    assert ac.Perturb(heads=HeadSet(heads=())).is_idle
    pair = ac.Perturb(heads=[one, one.changed(heads=[("dual:0", 1)], strength=1.0)])
    assert [two.strength for two in replace(pair, scale=2.0).sets] == [(0.5, 0.25), 1.0]
    assert [two.strength for two in ac.Perturb(heads=pair.sets, strength=0.5).sets] == [(0.25, 0.125), 0.5]
    changed = replace(plain, scale=2.0)
    assert (changed.scale, changed.sets[0].strength, changed.window) == (2.0, (0.5, 0.25), (0.0, 0.5))


def test_defaults_that_a_set_may_say_are_plain_values() -> None:
    """On the control, in its document and in the schema of documents."""
    control = ac.Perturb(layers="joint:0")
    assert (control.kind, control.strength, control.scale, control.window) == ("identity", 1.0, 3.0, (0.0, 1.0))
    assert all(type(value) in (str, float, tuple) for value in (control.kind, control.strength, control.window))
    assert control.to_dict() == ac.Perturb("identity", layers="joint:0", scale=3.0, strength=1.0).to_dict()
    assert control.to_dict() == {"name": "perturb", "layers": "joint:0"}
    (told,) = (
        one
        for one in json.loads(json.dumps(control_schema()))["oneOf"]
        if one["properties"]["name"] == {"const": "perturb"}
    )
    defaults = {name: told["properties"][name]["default"] for name in ("kind", "scale", "strength")}
    assert defaults == {"kind": "identity", "scale": 3.0, "strength": 1.0}


@pytest.mark.parametrize(
    "heads", [HeadSet(**SOME), [HeadSet(**SOME), HeadSet(**{**SOME, "heads": [("joint:0", 1)], "strength": 1.0})]]
)
def test_documents_hold_the_set_itself(heads: Any) -> None:
    control = ac.Perturb(heads=heads, scale=2.0)
    document = json.loads(json.dumps(control.to_dict()))
    again = ac.Control.from_dict(document)
    assert again.to_dict() == control.to_dict()
    assert again.sets == control.sets
    assert "search" not in json.dumps(document)
    with pytest.raises(ac.ControlError, match="a document holds a set of heads itself"):
        ac.Control.from_dict({"name": "perturb", "heads": "heads.json"})


def test_each_head_has_its_own_strength() -> None:
    """Against the dense formula, a head at a time; slerp's arc included."""
    q, k, v = tensors()
    for kind in ("identity", "temperature", "slerp"):
        out = run(edit(kind, (0.25, 1.0), heads=(0, 3)), q, k, v)
        for head, u in enumerate((0.25, 0.0, 0.0, 1.0)):
            expected = dense(kind, q, k, v, None, u)[1 if u else 0]
            assert (out[:, head] - expected[:, head]).abs().max() < 1e-12
    assert HEADS == 4
    assert edit("identity", (0.25, 1.0), heads=(0, 3)).explain() == "identity by 0.25 to 1, heads 0, 3"


def test_a_head_alone_is_changed_and_forgets_its_query_at_full_strength() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = run(edit("identity", (1.0, 0.5), heads=(1, 2)), q, k, v)
    plain = run(edit("identity", 0.0, heads=(0,)), q, k, v)
    changed = (out != plain).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, True, False]
    for head, reached in enumerate((True, False, True, True)):
        grads = torch.autograd.grad(out[:, head].square().sum(), (q, k), retain_graph=True)
        assert [bool(grad.any()) for grad in grads] == [reached, reached]


def test_a_set_is_heads_by_layer() -> None:
    """All heads of a layer are the layer; names of layers may be either of the two."""
    layer = draw(ac.Perturb("identity", layers="joint:1"))
    for name in ("joint:1", "transformer_blocks.1.attn"):
        assert torch.equal(draw(ac.Perturb(heads=HeadSet(heads=[(name, 1), (name, 0)]))), layer)
    one = HeadSet(heads=[("joint:0", 1), ("joint:1", 0)], strength=0.5)
    assert torch.equal(
        draw(ac.Perturb(heads=one)), draw(ac.Perturb(heads={"joint:0": [1], "joint:1": [0]}, strength=0.5))
    )


def test_every_sample_of_a_batch_has_a_set_of_its_own() -> None:
    """Rows of one batch with different heads are what separate batches of that size give, to the bit."""
    sets = [
        HeadSet(heads=[("joint:0", 0)]),
        HeadSet(heads=[("joint:1", 1)]),
        HeadSet(heads=[("joint:1", 1), ("dual:0", 0)], strength=[0.5, 1.0]),
    ]
    both = draw(ac.Perturb(heads=sets, replay=False), rows=3)
    # what is replayed comes from a batch with the negative prompt's rows, and so with another rounding
    replayed = draw(ac.Perturb(heads=sets), rows=3)
    for row, one in enumerate(sets):
        assert torch.equal(both[row], draw(ac.Perturb(heads=one, replay=False), rows=3)[row])
        assert (both[row] - draw(ac.Perturb(heads=one), rows=1)[0]).abs().max() < 1e-4
        assert (both[row] - replayed[row]).abs().max() < 1e-4
    assert (both[0] - both[1]).abs().max() > 1e-3
    with pytest.raises(ac.LayoutError, match="3 samples, but the batch has 2 rows"):
        draw(ac.Perturb(heads=sets), rows=1)
    with pytest.raises(ac.ControlError, match="one kind, scale and window"):
        ac.Perturb(heads=[sets[0], sets[1].changed(scale=1.0)])
    assert ac.Perturb(heads=[sets[0], sets[1].changed(scale=1.0)], scale=2.0).scale == 2.0


def test_a_set_of_another_model_is_refused() -> None:
    own = HeadSet(**SOME, model=identity_of(pipeline().transformer))
    other = tiny_pipes.sd3(seed=1)
    with pytest.raises(ac.ControlError, match=r"belong to another model \(weights \w+ and not \w+\)"):
        ac.attach(other, ac.Perturb(heads=own))
    assert not hasattr(other.transformer, "_attnctrl_engine")
    with pytest.raises(ac.ControlError, match="another model"):
        ac.processors(other, ac.Perturb(heads=own))
    ac.attach(other, ac.Perturb(heads=own.changed(model=None))).detach()
    ac.attach(other, ac.Perturb(heads=own, strength=0.0)).detach()
    # in half precision it is the same model
    half = tiny_pipes.sd3()
    half.transformer.to(torch.bfloat16)
    ac.attach(half, ac.Perturb(heads=own)).detach()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([("joint:1", 2)], "head 2 of joint:1, which has 2"),
        ([("joint:9", 0)], "a layer 'joint:9' that this model does not have"),
    ],
)
def test_heads_that_a_model_does_not_have_are_refused(heads: Any, message: str) -> None:
    with pytest.raises(ac.ControlError, match=message):
        ac.attach(pipeline(), ac.Perturb(heads=HeadSet(heads=heads)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"heads": [("a", -1)]}, "heads.0.1: .* found -1"),
        ({"heads": [("a", 0)], "strength": 1.5}, "less than or equal to 1"),
        ({"heads": [("a", 0)], "strength": [0.5, -0.5]}, "greater than or equal to 0"),
        ({"heads": [("a", 0)], "strength": [0.5, 0.5]}, "1 heads has one strength, or one for each; found 2"),
        ({"heads": [("a", 0)], "strength": float("nan")}, "finite"),
        ({"heads": [("a", 0), ("a", 0)]}, "names head 0 of a twice"),
        ({"heads": [("a", 0)], "window": (0.3, 0.3)}, "holds no step"),
        ({"heads": [("a", 0)], "window": (0.5, 0.3)}, "start <= stop"),
        ({"heads": [("a", 0)], "scale": -1.0}, "greater than or equal to 0"),
        ({"heads": [("a", 0)], "kind": "blurr"}, "kind"),
        ({"heads": [("a", 0)], "size": 3}, "size: Extra inputs"),
        ({"heads": [("a", 0)], "self": 3}, "self: Extra inputs"),
    ],
)
def test_sets_that_cannot_be(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ac.ControlError, match=message):
        HeadSet(**data)
    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"format": "attnctrl-heads-1", **data}))
    with pytest.raises(ac.ControlError, match=f"{path}: .*{message}"):
        ac.Perturb(heads=path)


def test_files_that_are_no_sets(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    with pytest.raises(ac.AssetError, match="There is no file"):
        ac.Perturb(heads=str(path))
    for text in ("[1", "[1, 2]", '{"heads": []}', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ac.ControlError, match="is no set of heads"):
            ac.Perturb(heads=path)


def test_scenes_hold_sets_and_name_no_files() -> None:
    from attnctrl.scenecheck import control_problems

    written = {"format": "attnctrl-heads-1", "heads": [["joint:0", 1]], "strength": 0.5}
    assert control_problems([{"name": "perturb", "heads": written}], False) == []
    assert control_problems([{"name": "perturb", "heads": [written, written]}], False) == []
    for wrong in ("heads.json", ["heads.json"], {**written, "strength": 2.0}, {"joint:0": "x"}):
        (problem,) = control_problems([{"name": "perturb", "heads": wrong}], False)
        assert problem.key.startswith("controls[0]")
