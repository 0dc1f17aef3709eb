"""The identities at the end of LAMIC's spec (arXiv 2508.00477), with texts that are words of one prompt."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import Setting, dense, probe, regions, unet
from setting import Kinds
from torch import Tensor

import attnctrl as ac
from attnctrl.controls.lamic import GIA

TABLE = """
    S  m  1     1  m     0     m
    C  1  1     1  A0B1  A0B1  1
    P  1  1     1  1     1     1
    R  m  A0B1  1  AmB1  A0B1  m
    U  0  A0B1  1  A0B1  1     0
    F  m  1     1  m     0     m
"""
"""The paper's table: columns S C P R U F; AxBy is x in phase A and y in phase B."""
HUBS = {
    "relay": lambda q, k: False,
    "source": lambda q, k: q in "CP" and k in "RUF",
    "drop": lambda q, k: "P" in (q, k) and q != k,
}


def flux(references: int = 0, batch: int = 1) -> Setting:
    """With a prompt of eight tokens."""
    inputs = tiny.flux_inputs(text=8, batch=batch, references=((2, 3),) * references)
    sequence = "text image references"
    return Setting(tiny.flux(), inputs, [Kinds(sequence, sequence)] * 4, text=8, references=references)


def worded(bound: bool = False) -> list[Any]:
    """Three regions, whose texts are tokens 0-2, 4 and 6 of a prompt of eight; its last token is padding."""
    spans = [((0, 3),), ((4, 5),), ((6, 7),)]
    return [
        ac.Region(one.prompt, box=one.box, spans=told, reference=r if bound and r < 2 else None)
        for r, (one, told) in enumerate(zip(regions(), spans, strict=True))
    ]


WORDS = ((0, 7),)


def sequence(setting: Setting, scene: list[Any]) -> list[tuple[str, frozenset[int]]]:
    """(letter, members) of each token of a FLUX forward."""
    text = [("C", frozenset[int]())] * setting.text
    for r, region in enumerate(scene):
        for start, stop in region.spans:
            text[start:stop] = [("S", frozenset([r]))] * (stop - start)
    text[7:] = [("P", frozenset[int]())] * (setting.text - 7)
    height, width = setting.grid
    image = []
    for y in range(height):
        for x in range(width):
            u, v = (x + 0.5) / width, (y + 0.5) / height
            held = frozenset(r for r, o in enumerate(scene) if o.box[0] < u < o.box[2] and o.box[1] < v < o.box[3])
            image.append(("R" if held else "U", held))
    shown = [("F", frozenset(r for r, o in enumerate(scene) if o.reference == k)) for k in range(setting.references)]
    return [*text, *image, *(one for one in shown for _ in range(6))]


def truth(tokens: list[tuple[str, frozenset[int]]], phase: str, hubs: str) -> Tensor:
    rows = [row.split() for row in TABLE.strip().split("\n")]
    marks = {row[0] + k: mark for row in rows for k, mark in zip("SCPRUF", row[1:], strict=True)}

    def sees(q: tuple[str, frozenset[int]], k: tuple[str, frozenset[int]]) -> float:
        mark = marks[q[0] + k[0]]
        mark = mark if len(mark) == 1 else mark[mark.index(phase) + 1]
        return float((mark == "1" or (mark == "m" and bool(q[1] & k[1]))) and not HUBS[hubs](q[0], k[0]))

    return torch.tensor([[sees(q, k) for k in tokens] for q in tokens], dtype=torch.float64)


def stack(scene: list[Any], phase: str, hubs: Any = "relay") -> list[Any]:
    isolation = ac.GroupIsolation(scene, words=WORDS, hubs=hubs)
    return [isolation, ac.RegionModulation(window=(0, 1))] if phase == "A" else [isolation]


@pytest.mark.parametrize("hubs", HUBS)
@pytest.mark.parametrize("phase", "AB")
def test_the_papers_tables_hold_in_every_layer(phase: str, hubs: str) -> None:
    setting, scene = flux(references=2), worded(bound=True)
    expected = truth(sequence(setting, scene), phase, hubs)
    with ac.attach(setting.model, stack(scene, phase, hubs)), probe() as calls:
        setting.run()
    assert len(calls) == 4
    for call in calls:
        assert call.error(dense(call.query, call.key, call.value, (expected, None))) < 1e-5


@pytest.mark.parametrize("phase", "AB")
def test_an_open_ground_and_the_texts_of_regions_see_each_other(phase: str) -> None:
    setting, scene = flux(), worded()
    tokens = sequence(setting, scene)
    expected = truth(tokens, phase, "relay")
    for i, (q, _) in enumerate(tokens):
        for j, (k, _) in enumerate(tokens):
            if {q, k} == {"S", "U"}:
                assert not expected[i, j]
                expected[i, j] = 1
    opened = [replace(stack(scene, phase)[0], ground="open"), *stack(scene, phase)[1:]]
    with ac.attach(setting.model, opened), probe() as calls:
        setting.run()
    for call in calls:
        assert call.error(dense(call.query, call.key, call.value, (expected, None))) < 1e-5


def test_in_cross_attention_the_ground_stays_parted() -> None:
    setting, scene = unet(), [replace(one, prompt="", spans=((r, r + 1),)) for r, one in enumerate(regions())]
    outputs = []
    for ground in ("parted", "open"):
        with ac.attach(setting.model, ac.GroupIsolation(scene, ground=ground), branches=("cond",)):
            outputs.append(setting.run())
    assert torch.equal(*outputs)


def test_one_entity_on_the_whole_canvas_is_vanilla() -> None:
    """Identity 1: phase B is all ones; phase A cuts the rest of the prompt from the picture."""
    setting = flux()
    whole = [ac.Region("all", spans=((0, 3),))]
    base = setting.run()
    with ac.attach(setting.model, ac.GroupIsolation(whole, words=WORDS)):
        assert torch.equal(setting.run(), base)
    with ac.attach(setting.model, [ac.GroupIsolation(whole), ac.RegionModulation(window=(0, 1))]):
        assert (setting.run() - base).abs().max() > 1e-3


@pytest.mark.parametrize("blocks", [2, 3])
def test_influence_over_blocks_is_what_explain_says(blocks: int) -> None:
    """Identity 3: in phase A, r0 reads the reference of r1 through its own reference and the prompt, in three blocks."""
    scene = [
        ac.Region(o.prompt, box=o.box, prompt_embeds=o.prompt_embeds, reference=r) for r, o in enumerate(regions()[:2])
    ]
    setting = flux(references=2)
    setting.model = tiny.flux(double=blocks, single=0)
    stack = [ac.GroupIsolation(scene), ac.RegionModulation(window=(0, 1))]
    hidden = setting.inputs["hidden_states"].requires_grad_()
    with ac.attach(setting.model, stack):
        own = setting.run()[0, :24][
            [letter == "R" and members == {0} for letter, members in sequence(setting, scene)[8:32]]
        ]
    leaked = torch.autograd.grad(own.square().sum(), hidden)[0][0, 30:36].abs().max()
    notes = str(ac.explain(setting.model, stack, grid=setting.grid, text_tokens=8, references=[(2, 3)] * 2))
    if blocks == 3:
        assert leaked > 0
        assert "image of r0 indirectly reads reference 1, from layer 3 on, through reference 0, prompt" in notes
    else:
        assert leaked == 0
        assert "image of r0 never reads reference 1" in notes


def test_plans_of_flux_at_full_size_take_no_mask() -> None:
    """Identity 7: memory grows with the tokens, not with their square; the stored figures are those of this code."""
    root = Path(__file__).parents[2] / "benchmarks"
    measured = runpy.run_path(str(root / "plan_memory.py"))["measure"]()
    assert json.loads((root / "results" / "plan-memory.json").read_text())["rows"] == measured
    assert max(row["tokens"] for row in measured) > 20_992
    assert all(row["plan_bytes"] < 12 * row["tokens"] + 8 * 14**2 for row in measured[2:])
    assert max(row["plan_bytes"] for row in measured) < 1e6


def test_tokens_that_nobody_reads_might_as_well_not_be_there() -> None:
    """Identity 4, on reference pictures."""
    table = str(GIA.with_marks("1", "**").with_marks("0", *(letter + "O" for letter in "SCPRUF")))
    setting, image = flux(references=2), 24
    without = {name: setting.inputs[name].narrow(-2, 0, image) for name in ("hidden_states", "img_ids")}
    plain = setting.run(**without)
    assert (setting.run()[:, :image] - plain).abs().max() > 1e-3
    with ac.attach(setting.model, ac.GroupIsolation(worded(), table=table)):
        assert (setting.run()[:, :image] - plain).abs().max() < 1e-5


@pytest.mark.parametrize("phase", "AB")
def test_the_order_of_entities_means_nothing(phase: str) -> None:
    """Identities 5 and 8: entities change places in the list, with all that is theirs."""
    setting, scene = flux(), worded()
    outputs = []
    for one in (scene, scene[::-1]):
        with ac.attach(setting.model, stack(one, phase)):
            outputs.append(setting.run())
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5


def test_the_same_text_in_the_prompt_or_appended_parts_the_same_tokens() -> None:
    """Words of a prompt that holds nothing else act as appended texts do, where the plain model reads them anyway."""
    setting = flux()
    text = setting.inputs["encoder_hidden_states"]
    first, second, rest = text[0, :3], text[0, 3:5], text[:, 5:]
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    inside = [ac.Region(box=box, spans=[span]) for box, span in zip(boxes, [(0, 3), (3, 5)], strict=True)]
    beside = [ac.Region(box=box, prompt_embeds=one) for box, one in zip(boxes, [first, second], strict=True)]
    with ac.attach(setting.model, ac.GroupIsolation(inside)):
        one = setting.run()
    with ac.attach(setting.model, ac.GroupIsolation(beside)):
        other = setting.run(encoder_hidden_states=rest, txt_ids=setting.inputs["txt_ids"][5:])
    assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("batch", [1, 2])
def test_private_hubs_are_a_copy_of_the_padding_for_each_region(batch: int) -> None:
    """The copies are the row's own padding, belong to their region, and regions and the original do not see each other."""
    setting, scene = flux(references=2, batch=batch), worded(bound=True)
    plain = sequence(setting, scene)
    copies = [("S", frozenset([r])) for r in range(3)]
    tokens = [*plain[:8], *copies, *plain[8:]]
    relay = truth(tokens, "B", "relay")
    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            if {q[0], k[0]} & {"P"} and {q[0], k[0]} & set("SRF"):
                relay[i, j] = 0
    read = []
    with (
        ac.attach(setting.model, ac.GroupIsolation(scene, words=WORDS, hubs="private")),
        setting.model.context_embedder.register_forward_pre_hook(lambda _m, args: read.append(args[0])),
        probe() as calls,
    ):
        setting.run()
    prompt = setting.inputs["encoder_hidden_states"]
    assert torch.equal(read[0], torch.cat([prompt, prompt[:, 7:].expand(-1, 3, -1)], 1))
    for call in calls:
        assert (call.out - dense(call.query, call.key, call.value, (relay, None))).abs().max() < 1e-5


def test_private_hubs_follow_texts_of_their_own_and_need_words() -> None:
    setting, scene = flux(), regions()
    scene[0] = worded()[0]
    read = []
    with (
        ac.attach(setting.model, ac.GroupIsolation(scene, words=WORDS, hubs="private")),
        setting.model.context_embedder.register_forward_pre_hook(lambda _m, args: read.append(args[0])),
    ):
        setting.run()
    prompt, pad = setting.inputs["encoder_hidden_states"], setting.inputs["encoder_hidden_states"][:, 7:]
    own = [one.prompt_embeds[None] for one in scene[1:]]
    assert torch.equal(read[0], torch.cat([prompt, pad, own[0], pad, own[1], pad], 1))
    with pytest.raises(ac.ControlError, match="without words nothing tells"):
        ac.GroupIsolation(scene, hubs="private")


def test_regions_that_two_controls_declare_are_the_same() -> None:
    """A stack split in time: in either part it is the one control, whose words and texts come once."""
    setting, scene = flux(), worded()
    scene[2] = regions()[2]
    read = []
    with setting.model.context_embedder.register_forward_pre_hook(lambda _m, args: read.append(args[0].shape[1])):
        with ac.attach(setting.model, [ac.GroupIsolation(scene, words=WORDS), ac.Isolate()]):
            alone = setting.run()
        never = ac.GroupIsolation(scene, words=WORDS, window=ac.Sigma(0.0, 0.0))
        stack = [ac.GroupIsolation(scene, words=WORDS, window=ac.Sigma(2.0, 0.0)), ac.Isolate(), never]
        with ac.attach(setting.model, stack):
            assert torch.equal(setting.run(), alone)
        with ac.attach(setting.model, [ac.GroupIsolation(scene, words=WORDS)] * 2):
            twice = setting.run()
        with ac.attach(setting.model, ac.GroupIsolation(scene, words=WORDS)):
            assert (setting.run() - twice).abs().max() < 1e-5
    assert len(set(read)) == 1


def test_softness_keeps_words_of_the_prompt_readable() -> None:
    """Strength s leaves what is cut the weight 1 - s, words of regions included."""
    setting, scene = flux(), worded()
    expected = truth(sequence(setting, scene), "B", "relay").clamp(min=0.25)
    with ac.attach(setting.model, ac.GroupIsolation(scene, words=WORDS, strength=0.75)), probe() as calls:
        setting.run()
    for call in calls:
        assert (call.out - dense(call.query, call.key, call.value, (expected, None))).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scene", "words", "message"),
    [
        ([ac.Region("a", spans=((0, 30),))], (), "not in the encoded prompt, which has 8"),
        ([ac.Region("a", spans=((0, 3),)), ac.Region("b", box=(0, 0, 0.5, 1), spans=((2, 4),))], (), "of another region"),
        ([ac.Region("a", spans=((0, 3),))], ((0, 9),), "The prompt: tokens"),
    ],
)  # fmt: skip
def test_words_that_are_not_there_are_refused(scene: Any, words: Any, message: str) -> None:
    setting = flux()
    with ac.attach(setting.model, ac.GroupIsolation(scene, words=words)), pytest.raises(ac.LayoutError, match=message):
        setting.run()


@pytest.mark.parametrize("spans", [((3, 3),), ((-1, 2),)])
def test_spans_hold_tokens(spans: Any) -> None:
    with pytest.raises(ac.LayoutError, match="from 0"):
        ac.Region("a", spans=spans)


@pytest.mark.parametrize("words", [3, [3], "all", [(1, 2), 3]])
def test_words_are_spans(words: Any) -> None:
    with pytest.raises(ac.ControlError, match="words are tokens"):
        ac.GroupIsolation([ac.Region("a")], words=words)


def test_words_belong_to_their_sample() -> None:
    """Two scenes of one batch, each with spans of its own, equal the two one by one."""
    setting, scene = flux(batch=2), worded()
    moved = [ac.Region(o.prompt, box=o.box, spans=[(a + 1, b + 1) for a, b in o.spans]) for o in scene]
    with ac.attach(setting.model, ac.GroupIsolation([scene, moved], words=[WORDS, [(0, 8)]])):
        both = setting.run()
    for number, (one, words) in enumerate([(scene, WORDS), (moved, [(0, 8)])]):
        with ac.attach(setting.model, ac.GroupIsolation(one, words=words)):
            assert (setting.run(**setting.single(number)) - both[number]).abs().max() < 1e-5


def test_controls_with_words_survive_json() -> None:
    control = ac.GroupIsolation(worded(), words=WORDS, hubs="source", ground="open", table=str(GIA))
    back = ac.Control.from_dict(control.to_dict())
    assert back.to_dict() == control.to_dict()
    assert [one.spans for one in back.regions] == [one.spans for one in worded()]
    assert (back.words, back.ground) == (WORDS, "open")
