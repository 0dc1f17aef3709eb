"""The identities at the end of the method specs of regional prompting (arXiv 2411.02395), Seg2Any and LAMIC."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from harness import Setting, flux, probe, regions, tokens

import attnctrl as ac


def controlled(setting: Setting, *controls: Any, **changes: Any) -> torch.Tensor:
    with ac.attach(setting.model, controls):
        return setting.run(**changes)


def image_of(setting: Setting, scene: list[Any], members: set[int]) -> torch.Tensor:
    """bool [image tokens]: those whose set of regions is `members`."""
    row = tokens(setting, scene, texts=False)[setting.text :]
    return torch.tensor([token.members == members for token in row])


def with_text(scene: list[Any], r: int, embeds: torch.Tensor) -> list[Any]:
    changed = list(scene)
    changed[r] = ac.Region(scene[r].prompt, box=scene[r].box, prompt_embeds=embeds)
    return changed


@pytest.mark.parametrize(
    "options", [{}, {"global_text": "none"}, {"base_ratio": 0.4}, {"base_ratio": 0.9, "overlap": "priority"}]
)
def test_one_region_on_the_whole_canvas_is_vanilla(options: Any) -> None:
    setting = flux()
    whole = ac.Region("all", prompt_embeds=setting.inputs["encoder_hidden_states"][0])
    base = setting.run()
    assert (controlled(setting, ac.Regions([whole], **options)) - base).abs().max() < 1e-5
    assert (controlled(setting, ac.Isolate(), ac.Regions([whole], **options)) - base).abs().max() < 1e-5
    # with "open" the image reads the same text twice
    assert (controlled(setting, ac.Regions([whole], global_text="open")) - base).abs().max() > 1e-2


def test_a_base_ratio_near_one_is_vanilla_and_none_leaves_the_prompt_unread() -> None:
    setting, scene = flux(), regions()
    near = controlled(setting, ac.Regions(scene, base_ratio=1 - 1e-7, global_text="none"))
    assert (near - setting.run()).abs().max() < 1e-4
    other = torch.randn_like(setting.inputs["encoder_hidden_states"])
    alone = ac.Regions(scene, global_text="none")
    assert torch.equal(controlled(setting, alone), controlled(setting, alone, encoder_hidden_states=other))
    assert not torch.equal(near, controlled(setting, ac.Regions(scene, base_ratio=0.5), encoder_hidden_states=other))


def test_isolated_regions_do_not_feel_each_others_texts() -> None:
    """Over all blocks: exactly nothing with isolation and an unread prompt, something with open image attention."""
    setting, scene = flux(), regions()
    changed = with_text(scene, 0, tiny.embeds(9, 2) * 3)
    # one plan for both, else kernels may round differently
    own, others = image_of(setting, scene, {0}), ~image_of(setting, scene, {0})
    for background in ("isolated", "shared"):
        stack = ac.Isolate(background=background), ac.Regions(scene, global_text="none")
        again = ac.Isolate(background=background), ac.Regions(changed, global_text="none")
        difference = (controlled(setting, *stack) - controlled(setting, *again))[0].abs().amax(-1)
        assert (difference[own] > 1e-4).all()
        if background == "isolated":
            assert difference[others].max() == 0
        else:
            assert (difference[others] > 1e-5).all()
    difference = (controlled(setting, ac.Regions(scene)) - controlled(setting, ac.Regions(changed)))[0].abs().amax(-1)
    assert (difference > 1e-5).all()


def test_the_hub_carries_information_unless_it_is_a_source() -> None:
    """R_1 <- prompt <- R_2 takes two blocks; with hub="source" there is no such path."""
    setting, scene = flux(), regions()[:2]
    changed = with_text(scene, 0, tiny.embeds(9, 2) * 3)
    other = image_of(setting, scene, {1})
    for hub in ("relay", "source"):
        stack = [ac.Isolate(hub=hub), ac.Regions(scene, global_text="open")]
        again = [ac.Isolate(hub=hub), ac.Regions(changed, global_text="open")]
        moved = (controlled(setting, *stack) - controlled(setting, *again))[0].abs().amax(-1)[other]
        notes = str(ac.explain(setting.model, stack, grid=setting.grid, text_tokens=setting.text))
        if hub == "relay":
            assert (moved > 1e-6).all()
            assert "image of r1 indirectly reads image of r0, from layer 2 on, through prompt" in notes
        else:
            assert moved.max() == 0
            assert "image of r1 never reads image of r0" in notes


def test_a_region_equals_its_crop() -> None:
    """Disjoint regions, isolation, prompt unread, all blocks: region r's tokens are those of a run with its text and tokens alone."""
    setting, scene = flux(), regions()
    out = controlled(setting, ac.Isolate(), ac.Regions(scene, global_text="none"))
    for r, region in enumerate(scene):
        mine = image_of(setting, scene, {r})
        alone = setting.run(
            hidden_states=setting.inputs["hidden_states"][:, mine],
            img_ids=setting.inputs["img_ids"][mine],
            encoder_hidden_states=region.prompt_embeds[None],
            txt_ids=torch.zeros(len(region.prompt_embeds), 3),
        )
        assert (out[:, mine] - alone).abs().max() < 2e-5


def test_relabelled_regions_change_nothing_and_doubled_ones_do() -> None:
    setting, scene = flux(), regions()
    base = controlled(setting, ac.Isolate(), ac.Regions(scene))
    assert (controlled(setting, ac.Isolate(), ac.Regions(scene[::-1])) - base).abs().max() < 1e-5
    assert (controlled(setting, ac.Isolate(), ac.Regions([*scene, scene[0]])) - base).abs().max() > 1e-3


def test_background_reads_all_is_one_way() -> None:
    """Seg2Any's asymmetry, in one layer: regions are independent of uncovered values, uncovered rows are not of theirs."""
    setting, scene = flux(), regions()
    uncovered = torch.zeros(setting.text, dtype=torch.bool)
    uncovered = torch.cat([uncovered, image_of(setting, scene, set())])
    covered = ~uncovered
    covered[: setting.text] = False
    with ac.attach(setting.model, ac.Isolate(scene, background="reads_all")), probe(grad=True) as calls:
        setting.run()
    for call in calls:
        grad = torch.autograd.grad(call.out[:, covered].square().sum(), call.value, retain_graph=True)[0]
        assert grad[:, uncovered].abs().max() == 0
        grad = torch.autograd.grad(call.out[:, uncovered].square().sum(), call.value)[0]
        assert (grad[:, covered].abs().amax(dim=(0, 2, 3)) > 0).all()


def test_two_layouts_in_a_row_equal_two_fresh_processes() -> None:
    setting = flux()
    first, second = regions(), regions(overlap=True)[:2]
    fresh = controlled(flux(), ac.Isolate(), ac.Regions(second))
    controlled(setting, ac.Isolate(), ac.Regions(first))
    assert torch.equal(controlled(setting, ac.Isolate(), ac.Regions(second)), fresh)


def test_a_reference_bound_to_a_region_is_read_there_only() -> None:
    """LAMIC's rule: another picture moves its own region and nothing that is isolated from it."""
    setting = flux(references=2)
    scene = [
        ac.Region(r.prompt, box=r.box, prompt_embeds=r.prompt_embeds, reference=k) for k, r in enumerate(regions()[:2])
    ]
    stack = [ac.Isolate(), ac.Regions(scene, global_text="none")]
    image = len(image_of(setting, scene, {0})) - 12
    other = setting.inputs["hidden_states"].clone()
    other[:, image : image + 6] = torch.randn(1, 6, tiny.CHANNELS, generator=torch.Generator().manual_seed(5))
    moved = (controlled(setting, *stack) - controlled(setting, *stack, hidden_states=other))[0].abs().amax(-1)[:image]
    mine = image_of(setting, scene, {0})[:image]
    assert (moved[mine] > 1e-4).all()
    assert moved[~mine].max() == 0


def test_strength_goes_continuously_to_the_plain_model() -> None:
    setting, scene = flux(), regions()
    base = setting.run()
    for make in (lambda s: [ac.Regions(scene, strength=s)], lambda s: [ac.Isolate(scene, strength=s)]):
        far = [(controlled(setting, *make(s)) - base).abs().max().item() for s in (1e-4, 1e-2, 0.5, 1.0)]
        assert far[0] < 2e-2
        assert far == sorted(far)
        near_one = controlled(setting, *make(1 - 1e-6))
        assert (near_one - controlled(setting, *make(1.0))).abs().max() < 1e-2


def test_declared_regions_serve_isolation_when_their_control_is_idle_or_over() -> None:
    setting, scene = flux(), regions()
    expected = controlled(setting, ac.Isolate(scene))
    assert torch.equal(controlled(setting, ac.Isolate(), ac.Regions(scene, strength=0)), expected)
    over = ac.Regions(scene, window=ac.Sigma(0.4, 0.0))  # the inputs stand at 0.5
    with pytest.warns(UserWarning, match="'regions'.* acted in none"):
        assert torch.equal(controlled(setting, ac.Isolate(), over), expected)


def test_strength_of_a_single_region() -> None:
    """A region of strength 0 is as good as not declared; its tokens are background."""
    setting, scene = flux(), regions()
    gone = [*scene[:2], ac.Region("r2", box=scene[2].box, prompt_embeds=scene[2].prompt_embeds, strength=0.0)]
    assert (controlled(setting, ac.Regions(gone)) - controlled(setting, ac.Regions(scene[:2]))).abs().max() < 1e-5
    half = [ac.Region(r.prompt, box=r.box, prompt_embeds=r.prompt_embeds, strength=0.5) for r in scene]
    assert (
        controlled(setting, ac.Regions(half)) - controlled(setting, ac.Regions(scene, strength=0.5))
    ).abs().max() < 1e-5


def test_the_layout_probe() -> None:
    """Which rows of the first joint layer move with which input: the layout the family file claims, in every diffusers release."""
    setting = flux(references=1)
    image = slice(setting.text, setting.text + 24)
    with probe() as before:
        setting.run()
    moves = {
        "encoder_hidden_states": slice(0, setting.text),
        "hidden_states": slice(setting.text, None),
    }
    for name, rows in moves.items():
        changed = setting.inputs[name].clone()
        changed[:, :] += torch.randn(changed.shape, generator=torch.Generator().manual_seed(1))
        with probe() as after:
            setting.run(**{name: changed})
        moved = (before[0].value - after[0].value)[0].abs().amax(dim=(1, 2)) > 0
        expected = torch.zeros(len(moved), dtype=torch.bool)
        expected[rows] = True
        assert torch.equal(moved, expected)
    ids = setting.inputs["img_ids"].clone()
    ids[:24, 1] += 7
    with probe() as after:
        setting.run(img_ids=ids)
    moved = (before[0].key - after[0].key)[0].abs().amax(dim=(1, 2)) > 0
    assert moved[image].all()
    assert moved.sum() == 24


def test_controls_that_do_not_fit_together() -> None:
    setting, scene = flux(), regions()
    with pytest.raises(ac.ControlError, match=r"'isolate' needs regions.*Regions\(\[\.\.\.\]\)"):
        ac.attach(setting.model, ac.Isolate())
    with pytest.raises(ac.ControlError, match="2 controls of one layer mix passes"):
        controlled(setting, ac.Regions(scene, base_ratio=0.1), ac.Regions(scene, base_ratio=0.2))
    with pytest.raises(ac.ControlError, match=r"different numbers of samples: \[2, 3\]"):
        ac.attach(setting.model, [ac.Regions([scene] * 2), ac.Isolate([scene] * 3)])
    with pytest.raises(ac.LayoutError, match="7 channels, the prompt has 12"):
        controlled(setting, ac.Regions([ac.Region("a", prompt_embeds=torch.zeros(2, 7))]))
    with pytest.raises(ac.ControlError, match="found str"):
        ac.attach(setting.model, ["regions"])
