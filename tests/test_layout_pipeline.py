"""Layouts in Python on tiny pipelines: batches equal single runs, references stay with their subjects, records make them again."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_mmdit_pipes
import tiny_pipes
import tiny_qwen_edit
import torch
from attnctrl.pipelines import LayoutPipeline, ScenePipeline, Subject
from PIL import Image
from shell import save_tiny

import attnctrl as ac
from attnctrl import provenance
from attnctrl.errors import AssetError, AttnCtrlError, ControlError, SceneError, UnsupportedModelError
from attnctrl.scene import Scene
from attnctrl.toybox.models.flux import tiny_pipeline

RED, BLUE = (Image.new("RGB", (24, 16), color) for color in ((255, 0, 0), (0, 0, 255)))
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
PROMPT = "a red circle and a blue square"
PAIR = [Subject("a red circle", LEFT, reference=RED, name="circle"), Subject("a blue square", RIGHT, reference=BLUE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module")
def pipe(folder):
    return LayoutPipeline.from_pretrained(str(folder / "tiny"), device="cpu")


def pixels(picture):
    return np.asarray(picture.image).astype(int)


def test_a_batch_of_two_layouts_equals_the_two_one_by_one(pipe):
    """Rows of a batch are computed together: equal but for float32 rounding, at most one level of 255."""
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[4:, 4:] = 255
    other = [
        Subject("a blue square", mask=mask, reference=BLUE),
        Subject("a red circle", (0, 0, 0.4, 0.4), reference=RED),
    ]
    layouts, prompts = [PAIR, other], [PROMPT, "a blue square"]
    grounds = [None, "a gray wall"]
    together = pipe(prompts, layouts, grounds, ["", "fog"], num_images_per_prompt=2, seeds=[3, 4, 5, 6])
    alone = [
        *pipe(prompts[0], layouts[0], num_images_per_prompt=2, seeds=[3, 4]),
        *pipe(prompts[1], layouts[1], grounds[1], "fog", num_images_per_prompt=2, seeds=[5, 6]),
    ]
    assert [picture.seed for picture in together] == [3, 4, 5, 6]
    for one, two in zip(together, alone, strict=True):
        assert np.abs(pixels(one) - pixels(two)).max() <= 1
        assert one.record["scene"] == two.record["scene"]
    assert np.abs(pixels(together[0]) - pixels(together[2])).max() > 20
    assert together[0].record["report"]["controls"][1]["rows"] == [("cond", 0), ("cond", 1)]


def test_a_record_makes_the_picture_again(pipe, tmp_path):
    subjects = [PAIR[0], Subject("a blue square", reference=BLUE, strength=0.5)]
    picture = pipe(PROMPT, subjects, seeds=8, reference_positions="region", reference_pixels=128)[0]
    path = picture.save(tmp_path / "p.png")
    scene, record = provenance.restore(path)
    again = ScenePipeline(pipe.pipe, pipe.identity, pipe.defaults)(scene)[0]
    assert (pixels(again) == pixels(picture)).all()
    assert provenance.differences(record, again.record) == []
    assert again.save(tmp_path / "q.png").read_bytes() == path.read_bytes()
    # what no box covers is the place of the one without
    assert [region.reference for region in scene.regions()] == [0, 1]
    assert scene.regions()[1].mask.mean() == 0.5


def test_a_reference_is_read_by_its_own_region_alone(pipe):
    """One layer of attention: outside its region nothing changes with a reference, to the bit."""
    model, outputs = pipe.pipe.transformer, {}
    block = model.transformer_blocks[0].attn

    def attended(right):
        seen = []
        hook = block.register_forward_hook(lambda _m, _a, output: seen.append(output[0].clone()))
        with hook:
            pipe(
                PROMPT,
                [PAIR[0], Subject("a blue square", RIGHT, reference=right)],
                num_inference_steps=1,
                true_cfg_scale=1,
            )
        return seen[0][0]

    outputs = attended(BLUE), attended(Image.new("RGB", (24, 16), (9, 99, 9)))
    changed = (outputs[0] != outputs[1]).any(-1)
    grid, first, second = changed[:64].reshape(8, 8), changed[64:70], changed[70:76]
    assert not grid[:, :4].any()
    assert grid[:, 4:].all()
    assert not first.any()
    assert second.all()


def test_seeds_are_those_of_the_pictures(pipe):
    first, second = pipe(PROMPT, PAIR, num_images_per_prompt=2, seeds=7)
    assert (first.seed, second.seed) == (7, 8)
    assert np.abs(pixels(second) - pixels(pipe(PROMPT, PAIR, seeds=8)[0])).max() <= 1
    state = torch.get_rng_state()
    drawn = [pipe(PROMPT, PAIR, generator=torch.Generator().manual_seed(2))[0] for _ in range(2)]
    assert drawn[0].seed == drawn[1].seed
    assert (pixels(drawn[0]) == pixels(drawn[1])).all()
    assert (torch.get_rng_state() == state).all()
    steps = []
    pipe(PROMPT, PAIR, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]


def test_texts_are_words_of_the_prompt_or_encoded_by_themselves(pipe):
    """In the prompt nothing is appended; outside of it each text is, and "auto" takes the first where it can."""
    seen = []

    def spans(regions):
        seen.append([region.spans for region in regions[0]])
        return ac.preset("references", regions)

    lengths = []
    with pipe.pipe.transformer.transformer_blocks[0].attn.register_forward_pre_hook(
        lambda _m, _a, told: lengths.append(told["encoder_hidden_states"].shape[1]), with_kwargs=True
    ):
        joint = pipe(PROMPT, PAIR, text_encoding="joint", controls=spans)[0]
        separate = pipe(PROMPT, PAIR, text_encoding="separate", controls=spans)[0]
        mixed = [PAIR[0], Subject("a green star", RIGHT, reference=BLUE)]
        auto = pipe(PROMPT, mixed, controls=spans)[0]
    assert seen == [[((0, 3),), ((4, 7),)], [(), ()], [((0, 3),), ()]]
    # each step has the prompt's forward and that of the negative prompt
    assert lengths == [40, 40] * 2 + [40 + 4 + 4, 40] * 2 + [40 + 4, 40] * 2
    assert (pixels(pipe(PROMPT, PAIR)[0]) == pixels(joint)).all()
    assert (pixels(joint) != pixels(separate)).any()
    assert auto.record["scene"]["text_encoding"] == "auto"
    with pytest.raises(SceneError, match=r"'a green star' is not in the prompt .*take 'separate' or 'auto'"):
        pipe(PROMPT, mixed, text_encoding="joint")


def test_a_record_with_words_of_the_prompt_makes_the_picture_again(pipe, tmp_path):
    picture = pipe(PROMPT, PAIR, text_encoding="joint", preset="lamic", seeds=4)[0]
    scene, record = provenance.restore(picture.save(tmp_path / "p.png"))
    again = ScenePipeline(pipe.pipe, pipe.identity, pipe.defaults)(scene)[0]
    assert (pixels(again) == pixels(picture)).all()
    assert provenance.differences(record, again.record) == []


def test_unets_are_not_parted_unless_asked():
    """Their preset is texts alone."""
    made = LayoutPipeline.from_pipe(tiny_pipes.sd())
    subjects = [Subject("a red circle", LEFT), Subject("a blue square", RIGHT)]
    told = {"num_inference_steps": 1, "width": 64, "height": 64}
    names = [one["name"] for one in made(PROMPT, subjects, **told)[0].record["scene"]["controls"]]
    assert names == ["group_isolation"]
    parted = made(PROMPT, subjects, preset="layout", text_encoding="separate", **told)[0]
    assert [one["name"] for one in parted.record["scene"]["controls"]] == ["isolate", "regions"]


def test_controls_are_a_preset_a_list_or_a_function(pipe):
    preset = pixels(pipe(PROMPT, PAIR)[0])

    def same(regions):
        assert [region.reference for region in regions[0]] == [0, 1]
        return [
            ac.Isolate(branch="all", window=(0, 0.7)),
            ac.GroupIsolation(regions, reference_weight=4.0, window=(0, 0.7)),
        ]

    assert (pixels(pipe(PROMPT, PAIR, controls=same)[0]) == preset).all()
    bare = pipe(PROMPT, PAIR, controls=[])[0]
    assert not bare.controlled
    assert (pixels(bare) != preset).any()
    named = pipe(PROMPT, PAIR, preset="lamic-fixed", overlap="priority")[0]
    given = pipe(PROMPT, PAIR, controls=lambda r: ac.preset("lamic-fixed", r, overlap="priority"))[0]
    assert (pixels(named) == pixels(given)).all()
    assert (pixels(named) != preset).any()
    assert [one["name"] for one in named.record["scene"]["controls"]] == [
        "group_isolation",
        "region_modulation",
        "isolate",
    ]
    # nothing has a place
    assert (pixels(pipe(PROMPT)[0]) == pixels(pipe(PROMPT, controls=[])[0])).all()


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_other_families_draw_layouts_and_name_who_follows_references(kind):
    pipe = LayoutPipeline.from_pipe(getattr(tiny_pipes, kind)())
    plain = [Subject("a red circle", LEFT), Subject("a blue square", RIGHT)]
    options = {"width": 32, "height": 32, "num_inference_steps": 2, "seeds": [1, 2]}
    two = pipe([PROMPT, "a blue square"], [plain, plain[:1]], negative_prompt="fog", **options)
    assert len(two) == 2
    assert "warning" not in two[0].report
    one = pipe("a blue square", plain[:1], negative_prompt="fog", **{**options, "seeds": 2})[0]
    assert np.abs(pixels(two[1]) - pixels(one)).max() <= 1
    with pytest.raises(
        UnsupportedModelError, match=r"Pipeline follows no reference picture.*FluxPipeline, .*Flux2Pipeline"
    ):
        pipe(PROMPT, PAIR, **options)


@pytest.mark.parametrize(
    ("subjects", "options", "message"),
    [
        ([Subject("x", (0, 0, 1.2, 1))], {}, r"layout 0: subjects\[0\].box: the box is not inside the picture"),
        ([Subject("x", mask=np.zeros((4, 4)))], {}, r"subjects\[0\].mask.*the mask is empty"),
        ([Subject("x", LEFT)] * 33, {}, r"subjects.*at most 32"),
        (
            [Subject("a red circle " * 30, LEFT)],
            {},
            r"layout 0: 'a red circle .* has \d+ tokens, and this model reads 40",
        ),
        (
            [Subject("x", LEFT, reference=Image.new("RGB", (1, 40)))],
            {},
            "reference 0: a side must have 8.*found 1 x 40",
        ),
        ([Subject("x", LEFT, reference=Image.new("RGB", (10000, 40)))], {}, "found 10000 x 40"),
        ([Subject("x", LEFT, reference="none.png")], {}, r"subjects\[0\].reference: 'none.png' is missing"),
        ([Subject("x", LEFT, reference=RED)] * 9, {}, "8 reference pictures at most"),
        ([Subject("x", (0, 0, 1, 1)), Subject("y", reference=RED)], {}, "'y' has a reference and no place"),
        ([Subject("x")], {}, r"subjects\[0\]: a subject needs a box, a mask or a reference"),
        (PAIR, {"preset": "lamik"}, "no preset named 'lamik'"),
        (PAIR, {"seeds": [1, 2]}, "1 prompts with 1 pictures each need 1 seeds; found 2"),
        (PAIR, {"seeds": 1, "generator": torch.Generator()}, "seeds or a generator, not both"),
        (PAIR, {"seeds": -1}, "seed: must be in"),
        (PAIR, {"width": 36}, "width"),
        (PAIR, {"background": ["a", "b"]}, "background: 1 prompts need one text, or 1; found 2"),
    ],
)
def test_what_cannot_be_is_said(pipe, subjects, options, message):
    with pytest.raises(AttnCtrlError, match=message):
        pipe(PROMPT, subjects, **options)


def test_batches_that_do_not_fit_and_torn_files_are_refused(pipe, tmp_path):
    with pytest.raises(
        SceneError, match=r"number of references must be the same in all samples.*sample 0: 2; sample 1: 1"
    ):
        pipe([PROMPT, "x"], [PAIR, PAIR[:1]])
    with pytest.raises(ControlError, match="2 prompts need 2 lists of subjects; found 1 entries"):
        pipe([PROMPT, "x"], [PAIR])
    RED.save(tmp_path / "red.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    with pytest.raises(AssetError, match=r"subjects\[0\].reference: the picture cannot be decoded"):
        pipe(PROMPT, [Subject("x", LEFT, reference=tmp_path / "torn.png")])
    pictures = [pipe(PROMPT, [Subject("x", LEFT, reference=r)])[0] for r in (tmp_path / "red.png", RED)]
    assert (pixels(pictures[0]) == pixels(pictures[1])).all()


@pytest.mark.parametrize("kind", ["flux2", "flux2_dev"])
def test_pipelines_with_references_of_their_own_get_them_bound(kind):
    pipe = LayoutPipeline.from_pipe(getattr(tiny_mmdit_pipes, kind)())
    large = [Image.new("RGB", (64, 64), color) for color in ((255, 0, 0), (0, 0, 255))]
    subjects = [Subject("a", LEFT, reference=large[0]), Subject("b", RIGHT, reference=large[1])]
    options = {"width": 16, "height": 16, "num_inference_steps": 1, "seeds": 1}
    picture = pipe("a b", subjects, **options)[0]
    assert "warning" not in picture.report
    assert picture.record["report"]["controls"][0]["rows"]
    with pytest.raises(SceneError, match="places and sizes references by itself"):
        pipe("a b", subjects, reference_positions="region", **options)
    with pytest.raises(SceneError, match="gives all samples of a batch the same references"):
        pipe(["a", "b"], [subjects, subjects], **{**options, "seeds": [1, 2]})


def test_references_of_qwen_edit_are_its_own_and_belong_to_regions(monkeypatch):
    """The pipeline brings all pictures to one area, and its language model reads them between the words of the prompt."""
    home = "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus"
    monkeypatch.setattr(f"{home}.VAE_IMAGE_SIZE", 32 * 32)
    monkeypatch.setattr(f"{home}.CONDITION_IMAGE_SIZE", 32 * 32)
    pipe = LayoutPipeline.from_pipe(tiny_qwen_edit.qwen_edit_plus())
    options = {"width": 32, "height": 32, "num_inference_steps": 1, "seeds": 1}
    inside = []

    def listen(_module, _args, told, output):
        inside.append((told["img_shapes"], told["encoder_hidden_states"].shape[1], output[0].clone()))

    with pipe.pipe.transformer.register_forward_hook(listen, with_kwargs=True):
        picture = pipe(PROMPT, PAIR, true_cfg_scale=1.0, **options)[0]
        bound, tokens, controlled = inside.pop()
        pipe(
            PROMPT,
            [Subject("a", reference=RED), Subject("b", reference=BLUE)],
            controls=[],
            true_cfg_scale=1.0,
            **options,
        )
        _, plain_tokens, plain = inside.pop()
    assert bound[0][0] == (1, 2, 2)
    assert len(bound[0]) == 3
    assert "warning" not in picture.report
    assert picture.record["report"]["controls"][1]["rows"] == [("cond", 0)]
    # texts of regions are encoded by themselves: where words of the prompt stand depends on the pictures
    assert tokens > plain_tokens
    assert (controlled[:, :4] != plain[:, :4]).any()
    with pytest.raises(SceneError, match="reads pictures together with the prompt"):
        pipe(PROMPT, PAIR, text_encoding="joint", **options)


@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_negative_prompts_of_subjects_act_in_their_regions_of_the_other_branch(kind):
    """As a stack of regions in each branch; the regions of one are nothing to the other."""
    pipe = LayoutPipeline.from_pipe(tiny_pipeline() if kind == "flux" else tiny_pipes.sd())
    guided = {"true_cfg_scale": 3.0} if kind == "flux" else {"guidance_scale": 3.0}
    options = {"width": 32, "height": 32, "num_inference_steps": 2, "seeds": 1, "negative_prompt": "dull", **guided}
    options["text_encoding"] = "separate"
    pair = [Subject("a red circle", LEFT, negative_prompt="blue"), Subject("a blue square", RIGHT)]
    plain = [Subject("a red circle", LEFT), Subject("a blue square", RIGHT)]
    with_negative, without = pipe(PROMPT, pair, **options)[0], pipe(PROMPT, plain, **options)[0]
    assert (pixels(with_negative) != pixels(without)).any()

    def by_hand(regions):
        regions = [[ac.Region(one.prompt, box=one.box) for one in scene] for scene in regions]
        return [
            *ac.preset("layout" if kind == "flux" else "texts", regions),
            ac.Regions([ac.Region("blue", box=LEFT)], branch="uncond"),
        ]

    assert (pixels(pipe(PROMPT, plain, controls=by_hand, **options)[0]) == pixels(with_negative)).all()
    again = ScenePipeline.from_pipe(pipe.pipe)(Scene.from_dict(with_negative.record["scene"]))[0]
    assert (pixels(again) == pixels(with_negative)).all()
    with pytest.raises(SceneError, match="without guidance nothing reads"):
        pipe(PROMPT, pair, **{**options, **dict.fromkeys(guided, 1.0)})
