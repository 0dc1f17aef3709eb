"""DiffUHaul's parts: keys in place of the own ones, outputs matched by place and by what they are, noise that moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attnctrl.pipelines.moving import moved_cells
from harness import flux, probe, sides_of, unet
from test_sharing import named

import attnctrl as ac

OLD, NEW = (0, 0, 2 / 6, 0.5), (3 / 6, 0.5, 5 / 6, 1)
SCENES = [[ac.Region(name="fox", box=OLD)], [ac.Region(name="fox", box=NEW)]]
PLACED: dict[str, Any] = {"readers": "anchors", "anchors": 1, "features": "place", "window": (0, 1), "branch": "all"}


def held(setting: Any, kinds: Any, scene: Any) -> torch.Tensor:
    """Numbers of the query tokens that the region of a scene holds, in raster order."""
    queries, _ = sides_of(setting, kinds, scene)
    return torch.tensor([n for n, token in enumerate(queries) if token.kind == "image" and token.members])


@pytest.mark.parametrize(("family", "own"), [(flux, 0.0), (unet, 0.0), (flux, 0.25)])
def test_own_image_tokens_count_as_often_as_asked_for(family: Any, own: float) -> None:
    """The formula in float64; with 0 the others' keys and values take the place of the own ones, texts stay."""
    setting = family(batch=2)
    base = setting.run()
    control = ac.Share(readers="anchors", anchors=1, own=own)
    with ac.attach(setting.model, control, branches=named(setting.model)), probe(grad=True) as calls:
        out = setting.run()
    assert (out[0] - base[0]).abs().max() < 1e-5
    for call, kinds in setting.controlled(calls):
        queries, keys = sides_of(setting, kinds, [])
        if not any(key.kind == "image" for key in keys):
            continue
        reads = torch.tensor([query.kind == "image" for query in queries])
        image = torch.tensor([key.kind == "image" for key in keys])
        weight = torch.where(reads[:, None] & image, own, 1.0).double()
        both = torch.cat([weight, reads[:, None].double().expand(-1, int(image.sum()))], 1)
        key, value = (torch.cat([x[1], x[0, image]]).double() for x in (call.key, call.value))
        scores = torch.einsum("qhd,khd->hqk", call.query[1].double(), key) / key.shape[-1] ** 0.5
        expected = torch.einsum("hqk,khd->qhd", (scores + both.log()).softmax(-1), value)
        assert (expected - call.out[1]).abs().max() < 1e-5
        if own == 0:
            (grad,) = torch.autograd.grad(call.out[1, reads].double().sum(), call.value, retain_graph=True)
            assert (grad[1, image] == 0).all()


def test_own_needs_readers_that_all_read() -> None:
    with pytest.raises(ac.ControlError, match="leave query_ratio at 1"):
        ac.Share(own=0.0, query_ratio=0.5)
    with pytest.raises(ac.ControlError, match="own must be in"):
        ac.Share(own=-1.0)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_by_place_a_subject_gets_the_outputs_that_it_had_where_it_stood(share: float) -> None:
    setting = unet(batch=2)
    control = ac.Harmonize(SCENES, strength=share, temperature=0.0, floor=0.0, **PLACED)
    with ac.attach(setting.model, control, branches=("cond",)) as handle, probe() as calls:
        setting.run()
    found = [(call, kinds) for call, kinds in setting.controlled(calls) if kinds.keys == "image"]
    for call, kinds in found:
        plain, mine, theirs = call.plain(), held(setting, kinds, SCENES[1]), held(setting, kinds, SCENES[0])
        expected = plain[1].clone()
        expected[mine] = plain[1, mine].lerp(plain[0, theirs], share)
        assert (call.out[1] - expected).abs().max() < 1e-5
        assert (call.out[0] - plain[0]).abs().max() < 1e-5
    assert "matched by place" in str(handle.report())


def test_by_place_of_another_size_the_nearest_tokens_match() -> None:
    """Twice as wide: every token is taken by two; a floor leaves out those that lie half a token off."""
    scenes = [[ac.Region(name="fox", box=(0, 0, 1 / 6, 0.5))], [ac.Region(name="fox", box=(0, 0.5, 4 / 6, 1))]]
    setting, taken = flux(batch=2), torch.tensor([0, 0, 0, 0, 6, 6, 6, 6])
    control = ac.Harmonize(scenes, strength=1.0, temperature=0.0, floor=0.0, **PLACED)
    with ac.attach(setting.model, control), probe() as calls:
        setting.run()
    call, kinds = setting.controlled(calls)[0]
    plain, mine = call.plain(), held(setting, kinds, scenes[1])
    assert (call.out[1, mine] - plain[0, setting.text + taken]).abs().max() < 1e-5


def test_by_outputs_equal_pictures_match_themselves() -> None:
    """DiffUHaul's identity: the nearest neighbour among identical features is the token itself."""
    setting = unet(batch=2)
    alike = {
        name: value[:1].expand(2, *value.shape[1:]).clone()
        for name, value in setting.inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 2
    }
    base = setting.run(**alike)
    told = {**PLACED, "features": "out", "floor": -1.0, "temperature": 0.0, "strength": 0.8}
    with ac.attach(setting.model, ac.Harmonize([SCENES[0]] * 2, **told), branches=("cond",)):
        assert (setting.run(**alike) - base).abs().max() < 1e-5
    with ac.attach(setting.model, ac.Harmonize(SCENES, **told), branches=("cond",)), probe() as calls:
        setting.run()
    call, kinds = next((call, kinds) for call, kinds in setting.controlled(calls) if kinds.keys == "image")
    plain, mine, theirs = call.plain(), held(setting, kinds, SCENES[1]), held(setting, kinds, SCENES[0])
    unit = torch.nn.functional.normalize(plain.flatten(2), dim=-1)
    match = theirs[(unit[1, mine] @ unit[0, theirs].mT).argmax(-1)]
    assert (call.out[1, mine] - plain[1, mine].lerp(plain[0, match], 0.8)).abs().max() < 1e-5


def test_a_subject_that_does_not_move_is_the_first_picture_drawn_again() -> None:
    """Drag 0, equal noise and prompts: both rows are the plain model's (section E, first identity)."""
    setting = unet(batch=2)
    alike = {
        name: value[:1].expand(2, *value.shape[1:]).clone()
        for name, value in setting.inputs.items()
        if isinstance(value, torch.Tensor) and value.ndim and len(value) == 2
    }
    base = setting.run(**alike)
    stack = [one for one in ac.preset("diffuhaul", [SCENES[0], SCENES[0]], anchoring=1.0) if one.window[0] == 0.0]
    with ac.attach(setting.model, stack, branches=("cond",), scheduler=_one_step(setting)):
        assert (setting.run(**alike) - base).abs().max() < 1e-5


def _one_step(setting: Any) -> Any:
    from types import SimpleNamespace

    mark = torch.tensor([float(setting.inputs["timestep"].reshape(-1)[0])])
    return SimpleNamespace(timesteps=mark, sigmas=mark / 1000, num_inference_steps=1)


def test_noise_moves_by_a_permutation() -> None:
    grid = (4, 6)
    for new in (NEW, (1 / 6, 0.25, 3 / 6, 0.75), OLD):
        order = moved_cells(OLD, new, grid)
        assert sorted(order.tolist()) == list(range(24))
        y, x = round(new[1] * 4), round(new[0] * 6)
        for dy in (0, 1):
            for dx in (0, 1):
                assert order[(y + dy) * 6 + x + dx] == dy * 6 + dx
        untouched = [n for n in range(24) if order[n] == n]
        assert len(untouched) >= 16
    assert torch.equal(moved_cells(OLD, (0, 0, 1, 1), grid), torch.arange(24))


def test_radius_is_not_of_places() -> None:
    with pytest.raises(ac.ControlError, match="places have none"):
        ac.Harmonize(features="place", radius=1)
