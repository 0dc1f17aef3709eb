"""Attention is read as the kernels compute it, in every family: the identities of reading attention, (a) 1 to 6."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_pipes
import torch
from harness import FAMILIES, Kernel, Kinds, Setting, branches, dense, probe, tokens, traces
from table import CASES, Case
from test_battery import made, passes
from torch import Tensor

import attnctrl as ac
from attnctrl import maps
from attnctrl.execute import sdpa
from attnctrl.families import family_of
from attnctrl.maps.probe import LayerProbe
from attnctrl.toybox.models.flux import tiny_pipeline

RIGHT = ac.Region("right half", box=(0.5, 0, 1, 1))
GROUPS = {"word": [(1, 3)], "text": "text", "image": "image", "right": RIGHT, "cells": maps.Cells(2, 2)}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
some_families = pytest.mark.parametrize("family", ["flux", "sd3", "unet", "zimage"])


def layers(setting: Setting) -> list[str]:
    """Names of the softmax layers in the order in which a forward calls them."""
    order: list[str] = []
    found = [layer for layer in family_of(setting.model).layers(setting.model) if not layer.linear]
    handles = [x.module.register_forward_pre_hook(lambda *_, name=x.name: order.append(name)) for x in found]
    setting.run()
    for handle in handles:
        handle.remove()
    return order


def record(setting: Setting, groups: Any = GROUPS, **options: Any) -> maps.Recording:
    return maps.record(setting.model, groups, branches=branches(setting.model), **options)


def columns(setting: Setting, kinds: Kinds, name: str) -> Tensor | None:
    """float64 [keys, c], token by token; None where a layer has no such keys."""
    keys = tokens(setting, [], texts=False, kinds=kinds.keys, grid=kinds.grid)
    wanted = "global" if name in ("word", "text") else "image"
    places = [n for n, token in enumerate(keys) if token.kind == wanted]
    if not places:
        return None
    if name == "word":
        sequence = kinds.keys.split()
        first = setting.glyphs * ("glyphs" in sequence and sequence.index("glyphs") < sequence.index("text"))
        places = places[first + 1 : first + 3]
    *_, height, width = kinds.grid
    found = torch.zeros(len(keys), 4, dtype=torch.float64)
    for number, place in enumerate(places):
        y, x = number // width % height, number % width
        cell = {"right": 0 if x >= width / 2 else None, "cells": y * 2 // height * 2 + x * 2 // width}.get(name, 0)
        if cell is not None:
            found[place, cell] = 1
    return found if name == "cells" else found[:, :1]


def of_image(setting: Setting, kinds: Kinds, rows: Tensor) -> Tensor:
    """[B, c, *grid] of the image's queries, from attention outputs [B, queries, heads, c], mean over heads."""
    queries = tokens(setting, [], texts=False, kinds=kinds.queries, grid=kinds.grid)
    image = [n for n, token in enumerate(queries) if token.kind == "image"]
    return rows.mean(2)[:, image].mT.reshape(len(rows), -1, *kinds.grid)


def as_values(call: Kernel, wanted: Tensor) -> Tensor:
    return wanted[None, :, None].expand(len(call.key), -1, call.key.shape[2], -1)


@every_family
def test_1_and_5_a_probe_is_the_dense_attention_row_by_row(family: Any) -> None:
    """Every layer, h != w; columns of a partition of the keys add up to one."""
    setting = family()
    with record(setting) as found, probe() as calls:
        setting.run()
    pairs = setting.controlled(calls)
    assert len(pairs) == len(layers(setting))
    read = 0
    for layer, (call, kinds) in zip(layers(setting), pairs, strict=True):
        if "image" not in kinds.queries.split():
            assert layer not in found.layers
            continue
        for name in GROUPS:
            wanted = columns(setting, kinds, name)
            if wanted is None:
                with pytest.raises(ac.ControlError, match="was not read in layer"):
                    found.of_layer(name, layer)
                continue
            expected = of_image(setting, kinds, replace(call, value=as_values(call, wanted)).plain())
            got = found.of_layer(name, layer)
            assert (got.reshape(expected.shape) - expected).abs().max() < 3e-6
            read += 1
    assert read >= 5
    parts = found["cells"].sum(1) - found["image"]
    assert parts.abs().max() < 1e-6


@every_family
def test_2_recording_changes_nothing_and_leaves_no_trace(family: Any) -> None:
    setting = family(batch=2)
    base, before = setting.run(), traces(setting.model)
    for when in ("pre", "post"):
        with record(setting, when=when) as found:
            assert torch.equal(setting.run(), base)
        assert found["image"].shape[0] == 2
        assert traces(setting.model) == before
    assert torch.equal(setting.run(), base)


@pytest.mark.parametrize("order", ["controls first", "record first"])
@pytest.mark.parametrize("when", ["pre", "post"])
@some_families
def test_2_nor_does_it_under_controls(family: str, when: str, order: str) -> None:
    setting, case = FAMILIES[family](), CASES["stack-soft"]
    named = branches(setting.model)

    def attach() -> Any:
        return ac.attach(setting.model, case.controls(case.scene()), branches=named)

    with attach():
        base = setting.run()
    before = traces(setting.model)
    entered = [attach, lambda: record(setting, when=when)]
    handles = [enter() for enter in (entered if order == "controls first" else entered[::-1])]
    assert torch.equal(setting.run(), base)
    assert torch.equal(setting.run(), base)
    for handle in handles:
        handle.detach()
    assert traces(setting.model) == before


def test_2_an_exception_leaves_no_trace_either() -> None:
    setting = FAMILIES["flux"]()
    before = traces(setting.model)
    setting.model.norm_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), record(setting):
        setting.run()
    setting.model.norm_out._forward_pre_hooks.clear()
    assert traces(setting.model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_3_gradients_of_a_probe_are_the_dense_ones(dtype: torch.dtype) -> None:
    """Also more groups than channels, and linear in the groups."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=generator).to(dtype).requires_grad_() for n in (5, 11))
    groups, weight = torch.randn(11, 20, generator=generator), torch.randn(2, 3, 5, 20, generator=generator).double()
    mask = torch.rand(5, 11, generator=generator) > 0.3
    mask[:, 0] = True
    found = maps.probe(query, key, groups, mask=mask, scale=0.4)
    exact = [x.detach().double().requires_grad_() for x in (query, key)]
    scores = exact[0] @ exact[1].mT * 0.4
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ groups.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert (found.double() - expected).abs().max() < tolerance
    got = torch.autograd.grad((found.double() * weight).sum(), (query, key))
    for ours, theirs in zip(got, torch.autograd.grad((expected * weight).sum(), exact), strict=True):
        assert (ours - theirs).abs().max() < 10 * tolerance
    assert torch.allclose(maps.probe(query.float(), key.float(), torch.eye(11)).sum(-1), torch.ones(2, 3, 5))


def test_3_no_graph_is_kept() -> None:
    setting = FAMILIES["flux"]()
    setting.inputs["hidden_states"].requires_grad_()
    with record(setting) as found:
        out = setting.run()
    (grad,) = torch.autograd.grad(out.sum(), setting.inputs["hidden_states"])
    assert grad.abs().max() > 0
    assert not found["word"].requires_grad
    assert torch.equal(grad, torch.autograd.grad(setting.run().sum(), setting.inputs["hidden_states"])[0])


@pytest.mark.parametrize(
    "row", ["isolate", "isolate-soft", "regions", "regions-base", "stack", "stack-soft", "lamic-a"]
)
@some_families
def test_4_post_is_the_controlled_attention(family: str, row: str) -> None:
    """As the table's dense weights have it; what is forbidden reads exactly 0 there, and more than 0 before."""
    case: Case = CASES[row]
    setting, scene = made(FAMILIES[family], case), case.scene()
    groups = {"mine": scene[0], "middle": scene[1], **({"its text": "text.region0"} if case.texts else {})}
    with (
        ac.attach(setting.model, case.controls(scene), branches=branches(setting.model)),
        record(setting, groups, when="post") as post,
        record(setting, groups) as pre,
        probe() as calls,
    ):
        setting.run()
    zeros = 0
    for layer, (call, kinds) in zip(layers(setting), setting.controlled(calls), strict=True):
        if "image" not in kinds.queries.split():
            continue
        queries, keys = (
            tokens(setting, scene, texts=case.texts, kinds=side, grid=kinds.grid)
            for side in (kinds.queries, kinds.keys)
        )
        image = [n for n, token in enumerate(queries) if token.kind == "image"]
        for name, member in (("mine", 0), ("middle", 1), ("its text", None)):
            wanted = [
                float(
                    member in k.members if k.kind == "image" else member is None and k.kind == "text" and k.owner == 0
                )
                for k in keys
            ]
            if not any(wanted) or name not in groups:
                continue
            weighed = passes(setting, case, scene, kinds)
            values = as_values(call, torch.tensor(wanted, dtype=torch.float64)[:, None])
            expected = dense(call.query, call.key, values, *weighed).mean(2)[0, image, 0]
            got = post.of_layer(name, layer)[0].flatten()
            assert (got - expected).abs().max() < 1e-6
            assert (got[expected == 0] == 0).all()
            zeros += int((expected == 0).sum())
            if member is not None:
                assert (pre.of_layer(name, layer) > 0).all()
            else:
                assert (pre.of_layer(name, layer) == 0).all()  # the model by itself has no such text
    assert (zeros > 0) == (row != "isolate-soft")


def test_4_pre_is_the_model_without_appended_texts() -> None:
    """The first layer's queries and keys are not yet touched by controls: it reads as without any."""
    setting = FAMILIES["flux"]()
    first = layers(setting)[0]
    with record(setting) as plain:
        setting.run()
    scene = CASES["regions"].scene()
    with ac.attach(setting.model, [ac.Regions(scene)]), record(setting) as under:
        setting.run()
    for name in GROUPS:
        assert torch.allclose(plain.of_layer(name, first), under.of_layer(name, first), atol=1e-6)
    assert not torch.allclose(plain["word"], under["word"], atol=1e-4)


def test_5_only_the_latents_of_kontext_are_read_and_references_are_keys() -> None:
    setting = FAMILIES["flux"](references=2)
    groups = {**GROUPS, "first": "reference.0", "references": "references"}
    with record(setting, groups) as found:
        setting.run()
    assert found["first"].shape == (1, 4, 6)
    total = found["text"] + found["image"] + found["references"]
    assert (total - 1).abs().max() < 1e-6
    assert (found["first"] < found["references"]).all()


def test_5_a_pixel_that_attends_to_one_word_lights_up() -> None:
    """Image token (2, 5) of 4 x 6, behind five of text, looks for text token 3; all others look everywhere alike."""
    query, key = torch.zeros(1, 2, 24 + 5, 16), torch.zeros(1, 2, 24 + 5, 16)
    query[:, :, 5 + 2 * 6 + 5], key[:, :, 3] = 10, 10
    groups = torch.zeros(29, 1)
    groups[3] = 1
    seen: list[Tensor] = []
    layer = LayerProbe(
        rows=slice(0, 1), batch=1, tokens=(29, 29), image=((5, 29),), grid=(4, 6), groups=groups[None], hidden=None, act=None, put=seen.append
    )  # fmt: skip
    layer.look(query, key, key, None, sdpa, None)
    expected = torch.full((4, 6), 1 / 29)
    expected[2, 5] = 1
    assert torch.allclose(seen[0][0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["sd3", "unet", "flux"])
def test_6_samples_do_not_depend_on_other_rows(family: str) -> None:
    """A batch of two, and guidance in one batch, read as each row by itself."""
    setting = FAMILIES[family](batch=2)
    with record(setting) as both:
        setting.run()
    for row in range(2):
        with record(setting) as alone:
            setting.run(**setting.single(row))
        for name in GROUPS:
            assert torch.allclose(both[name][row], alone[name][0], atol=1e-5)
    if family != "flux":
        for number, branch in enumerate(("uncond", "cond")):
            with maps.record(setting.model, GROUPS, branches=("uncond", "cond"), branch=branch) as half:
                setting.run()
            assert half["word"].shape[0] == 1
            assert torch.allclose(half["word"][0], both["word"][number], atol=1e-6)


PIPES = {"flux": tiny_pipeline, "sd": tiny_pipes.sd, "sd3": tiny_pipes.sd3}


@pytest.mark.parametrize("name", PIPES)
def test_6_prompts_find_their_own_words_with_guidance_on_and_off(name: str) -> None:
    pipe = PIPES[name]()
    prompts = ["a red circle left", "gray background, a red circle"]
    guided = {"true_cfg_scale" if name == "flux" else "guidance_scale": 3.0}
    size = {"flux": (32, 48), "sd": (16, 24), "sd3": (32, 48)}[name]
    length = {} if name == "sd" else {"max_sequence_length": 24}
    options: Any = {"height": size[0], "width": size[1], "num_inference_steps": 1, "output_type": "latent", **length}

    def run(texts: list[str], groups: Any, seeds: tuple[int, ...], **more: Any) -> maps.Recording:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds for _ in range(2)]
        with maps.record(pipe, groups, prompt=texts, **length) as found:
            pipe(texts, num_images_per_prompt=2, generator=generators, **options, **more)
        return found

    off = {"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0}
    negative = {"negative_prompt": ["", ""]} if name == "flux" else {}
    both = run(prompts, {"it": "red circle"}, (0, 1), **guided, **negative)
    assert both["it"].shape[0] == 4
    assert both.report().controls[0].rows == (("cond", 0),)
    assert torch.allclose(both.per_prompt("it"), both["it"].reshape(2, 2, *both.grid).mean(1))
    for number, prompt in enumerate(prompts):
        alone = run([prompt], {"it": "red circle"}, (number,), **off)
        assert torch.allclose(both["it"][2 * number : 2 * number + 2], alone["it"], atol=1e-5)
        spans = ac.phrase_spans(pipe, prompt, "red circle", **length)
        assert torch.equal(run([prompt], {"it": spans}, (number,), **off)["it"], alone["it"])


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize(("window", "steps"), [((0.0, 1.0), (0, 1, 2)), ((0.5, 1.0), (1, 2))])
def test_every_step_counts_once_and_a_further_run_begins_anew(name: str, window: Any, steps: Any) -> None:
    """Schedulers with and without a step of their own; the mean over steps is that of the steps one by one."""
    pipe, prompt = PIPES[name](), "a red circle left"
    length: Any = {} if name == "sd" else {"max_sequence_length": 24}
    size = {"height": 16, "width": 24} if name == "sd" else {"height": 32, "width": 48}

    def run(**options: Any) -> maps.Recording:
        return maps.record(pipe, ["red circle"], prompt=prompt, **length, **options)

    singles = [run(window=(n / 3 + 0.1, n / 3 + 0.2)) for n in steps]
    with run(window=window) as found:
        for seed in (7, 0):
            generator = torch.Generator().manual_seed(seed)
            pipe(prompt, num_inference_steps=3, generator=generator, output_type="latent", **length, **size)
    for single in singles:
        single.detach()
    assert found.steps == steps
    mean = torch.stack([single["red circle"] for single in singles]).mean(0)
    assert torch.allclose(found["red circle"], mean, atol=1e-6)
    assert found.masses("red circle").shape == (len(steps), 1)
    assert torch.allclose(found.masses("red circle").mean(), found["red circle"].mean(), atol=1e-3)


def test_what_cannot_be_recorded_is_refused() -> None:
    setting = FAMILIES["flux"]()
    with pytest.raises(ac.LayoutError, match=r"give record\(..., prompt=...\)"):
        record(setting, ["a cat"])
    with pytest.raises(ac.LayoutError, match="There is no group of keys"):
        record(setting, {})
    with pytest.raises(ac.ControlError, match="over must be 'mean', 'last' or a share"):
        record(setting, over=1.5)
    with pytest.raises(ac.ControlError, match="branch must be one of cond, uncond"):
        record(setting, branch="all")
    groups = {"text": "text", "first": "reference.0", "fine": maps.Cells(64, 1)}
    with record(setting, groups, layers="single") as found:
        with pytest.raises(ac.ControlError, match="Nothing has been read yet"):
            _ = found.grid
        setting.run()
    with pytest.raises(ac.ControlError, match="There is no group 'cat' in this record; it has text, first"):
        _ = found["cat"]
    assert (found.get("first"), found.get("fine")) == (None, None)
    assert torch.equal(found.get("text"), found["text"])
    with pytest.raises(ac.ControlError, match=r"'fine' was not read: .* \(cells where an image has as many tokens"):
        _ = found["fine"]
    with pytest.raises(ac.ControlError, match="'first' was not read"):
        _ = found["first"]
    with (
        maps.record(setting.model, GROUPS, prompt=["a", "b"]),
        pytest.raises(ac.LayoutError, match="2 prompts, but branch 'cond' has 1 rows"),
    ):
        setting.run()


def test_a_compiled_model_is_refused() -> None:
    setting = FAMILIES["flux"]()
    setting.model.compile(backend="eager")
    with record(setting), pytest.raises(ac.UnsupportedModelError, match="cannot be recorded inside compiled code"):
        setting.run()
