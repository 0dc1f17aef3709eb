"""Several references on FLUX: one is stock Kontext to the bit, each stands where it is told to, batches equal single runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attnctrl.pipelines import with_references
from attnctrl.pipelines.references import load_reference, plan_references, raster_ids, reference_size
from diffusers import FluxKontextPipeline, StableDiffusionPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

import attnctrl as ac
from attnctrl.errors import AssetError, ControlError, LayoutError, UnsupportedModelError
from attnctrl.families.flux import rasters
from attnctrl.toybox.models.flux import tiny_pipeline

CALL = {"width": 32, "height": 32, "max_area": 32 * 32, "num_inference_steps": 2, "max_sequence_length": 16}
CFG = {"true_cfg_scale": 3.0, "negative_prompt": "", "guidance_scale": 1.0}
LEFT = ac.Region("a red circle", box=(0, 0, 0.5, 1), reference=0)
RIGHT = ac.Region("a blue square", box=(0.5, 0, 1, 1), reference=1)


def picture(color, width=24, height=16):
    """Two colours, so that its place matters."""
    made = Image.new("RGB", (width, height), color)
    made.paste((255, 255, 255), (0, 0, width // 2, height // 2))
    return made


RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))


@pytest.fixture(scope="module")
def pipe():
    made = tiny_pipeline()
    generator = torch.Generator().manual_seed(0)
    for parameter in made.transformer.parameters():
        if parameter.ndim > 1:  # large enough for attention to matter
            parameter.data.normal_(std=1.5 / parameter.shape[1] ** 0.5, generator=generator)
    return made


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw(pipe, prompt="a red circle", **options):
    options = {**CALL, "generator": generators(1), "output_type": "latent", **options}
    return pipe(prompt=prompt, **options).images


def seen_ids(pipe, **options):
    """The position ids that the transformer gets."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["img_ids"]), with_kwargs=True
    )
    with hook:
        draw(pipe, **{"num_inference_steps": 1, **options})
    return seen[0]


# stock


@pytest.mark.parametrize(
    "options",
    [
        {},
        CFG,
        {
            "prompt": ["a red circle", "a blue square"],
            "generator": generators(1, 2),
            **CFG,
            "negative_prompt": ["", ""],
        },
        {"num_images_per_prompt": 2, "generator": generators(1, 2)},
        {"generator": torch.Generator().manual_seed(4)},
    ],
    ids=["plain", "true-cfg", "batch", "images-per-prompt", "one-generator"],
)
def test_one_picture_is_stock_kontext_to_the_bit(pipe, options, monkeypatch):
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(16, 40), (40, 24)])

    def again():
        given = options.get("generator")
        fresh = (
            None
            if given is None
            else [g.clone_state() for g in given]
            if isinstance(given, list)
            else given.clone_state()
        )
        return {**options, **({"generator": fresh} if fresh else {})}

    stock = FluxKontextPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    made = picture((9, 200, 9), 45, 31)
    for auto in (False, True):
        expected = draw(stock, image=made, _auto_resize=auto, **again())
        assert torch.equal(draw(with_references(pipe, [made], auto_resize=auto), **again()), expected)
        # a Kontext pipeline is as good as a text-to-image one
        if not options:
            assert torch.equal(draw(with_references(stock, [made], auto_resize=auto)), expected)


def test_no_picture_is_stock_without_one(pipe):
    stock = FluxKontextPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(draw(with_references(pipe, [])), draw(stock))


def test_half_precision_is_stock_to_the_bit():
    half = tiny_pipeline().to(torch.bfloat16)
    stock = FluxKontextPipeline(**half.components)
    stock.set_progress_bar_config(disable=True)
    assert torch.equal(draw(with_references(half, [RED])), draw(stock, image=RED, _auto_resize=False))
    regions = [ac.Region(box=(0.1, 0.2, 0.4, 0.9), reference=0)]
    ids = seen_ids(with_references(half, [RED], positions="region", regions=regions))
    assert ids.dtype == torch.float32
    assert [grid for _, grid in rasters(ids)] == [(4, 4), (2, 3)]


# several


def test_both_pictures_come_in_and_their_order_is_theirs(pipe):
    one, two, swapped = (with_references(pipe, pictures) for pictures in ([RED], [RED, BLUE], [BLUE, RED]))
    assert seen_ids(two)[:, 0].tolist() == [0] * 16 + [1] * 12
    pair = draw(two, **CFG)
    assert (pair - draw(one, **CFG)).abs().max() > 1e-2
    assert (pair - draw(with_references(pipe, [RED, RED]), **CFG)).abs().max() > 1e-2
    # at one corner nothing but a mask tells them apart
    assert torch.allclose(draw(swapped, **CFG), pair, atol=1e-4)
    assert (draw(with_references(pipe, [BLUE, RED], positions="apart"), **CFG) - pair).abs().max() > 1e-2
    with ac.attach(swapped, ac.Regions([LEFT, RIGHT])):
        bound = draw(swapped)
    with ac.attach(two, ac.Regions([LEFT, RIGHT])) as handle:
        assert (draw(two) - bound).abs().max() > 1e-2
        assert not handle.report().warnings


def test_true_cfg_gives_both_branches_the_references(pipe):
    lengths = []
    made = with_references(pipe, [RED, BLUE])
    hook = made.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    with hook:
        draw(made, **CFG)
    assert lengths == [16 + 2 * 6] * 4


@pytest.mark.parametrize("controlled", [False, True])
def test_samples_with_their_own_pictures_equal_single_runs(pipe, controlled):
    """Rows of a batch are computed together: equal up to float32 rounding."""
    samples, prompts = [[RED, BLUE], [picture((0, 0, 0)), RED]], ["a red circle", "a blue square"]
    control = [ac.Regions([LEFT, RIGHT])] if controlled else []
    options = {**CFG, "num_images_per_prompt": 2}

    def run(pictures, prompt, seeds):
        made = with_references(pipe, pictures)
        with ac.attach(made, control):
            # stock FLUX wants as many negative prompts as prompts
            negative = "" if isinstance(prompt, str) else [""] * len(prompt)
            return draw(made, prompt, **{**options, "negative_prompt": negative}, generator=generators(*seeds))

    together = run(samples, prompts, (1, 2, 3, 4))
    singles = torch.cat([run(samples[0], prompts[0], (1, 2)), run(samples[1], prompts[1], (3, 4))])
    assert torch.allclose(together, singles, rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-2


def test_the_source_pipeline_stays_what_it_is(pipe):
    kind, before = type(pipe), draw_plain(pipe)
    made = with_references(pipe, [RED])
    draw(made)
    assert type(pipe) is kind
    assert made.transformer is pipe.transformer
    assert torch.equal(draw_plain(pipe), before)


def draw_plain(pipe):
    options = {key: value for key, value in CALL.items() if key != "max_area"}
    return pipe("a red circle", **options, generator=generators(1), output_type="latent").images


def test_offloading_is_put_back_as_the_source_set_it_up():
    pipe = tiny_pipeline()
    expected = draw(with_references(pipe, [RED, BLUE]))
    pipe.enable_model_cpu_offload(device="cpu")
    calls = []
    pipe.maybe_free_model_hooks = lambda: calls.append(1)
    assert torch.equal(draw(with_references(pipe, [RED, BLUE])), expected)
    assert calls == [1]


# places


def test_the_middle_of_a_reference_lies_on_its_region(pipe):
    mask = torch.zeros(8, 8)
    mask[6:, 4:8] = 1  # its middle at (0.75, 0.875)
    regions = [ac.Region(box=(0.1, 0.2, 0.5, 0.6), reference=0), ac.Region(mask=mask, reference=1)]
    ids = seen_ids(with_references(pipe, [RED, BLUE, picture((0, 0, 0), 8, 8)], positions="region", regions=regions))
    assert torch.equal(ids[:16, 1:], torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)))
    for part, (x, y) in ((ids[16:22], (0.3, 0.4)), (ids[22:28], (0.75, 0.875)), (ids[28:], (0.5, 0.5))):
        assert part[:, 0].tolist() == [1.0] * len(part)
        # token (r, c) covers [r, r + 1) x [c, c + 1) of 4 x 4
        assert part[:, 1:].mean(0).tolist() == pytest.approx([4 * y - 0.5, 4 * x - 0.5], abs=1e-6)
    assert [grid for _, grid in rasters(ids)] == [(4, 4), (2, 3), (2, 3), (1, 1)]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0.5, 0.25), (0.5, 0.75)),  # edge to edge, one above the other
        ((0.2, 0.2), (0.8, 0.9)),  # the second begins below and right of the end of the first
        ((0.8, 0.9), (0.2, 0.2)),
        ((0.125, 0.5), (0.875, 0.5)),
        ((0.5, 0.5), (0.5, 0.5)),
    ],
)
def test_references_at_any_two_places_are_told_apart(first, second):
    regions = [
        ac.Region(box=(x - 0.05, y - 0.05, x + 0.05, y + 0.05), reference=k) for k, (x, y) in enumerate((first, second))
    ]
    for pictures in (
        [RED, BLUE],
        [picture((1, 1, 1), 16, 8), picture((1, 1, 1), 16, 8)],
        [RED, picture((1, 1, 1), 8, 8)],
    ):
        plan = plan_references(pictures, 8, "region", regions)
        corners = plan.corners((4, 4))
        assert [grid for _, grid in rasters(raster_ids(plan.grids, corners))] == plan.grids
        for (height, width), (_, row, column), (x, y) in zip(plan.grids, corners, (first, second), strict=True):
            assert row + height / 2 == pytest.approx(4 * y)
            assert column + width / 2 == pytest.approx(4 * x, abs=1 / 64)


def test_apart_counts_the_first_axis(pipe):
    ids = seen_ids(with_references(pipe, [RED, BLUE, RED], positions="apart"))
    assert ids[:, 0].tolist() == [0.0] * 16 + [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    assert torch.equal(ids[22:28, 1:], ids[16:22, 1:])


# sizes and bad input


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((48, 48), {}, (48, 48)),
        ((23, 47), {}, (16, 40)),
        ((8, 8), {}, (8, 8)),
        ((2048, 1024), {"max_pixels": 512 * 512}, (720, 360)),  # 724.08 x 362.04
        ((4096, 8), {"max_pixels": 64 * 64}, (1448, 8)),  # 1448.2 x 2.8: never below one token
        ((32, 48), {"auto_resize": True}, (832, 1248)),
        ((2048, 2048), {}, (1024, 1024)),
    ],
)
def test_sizes_are_whole_tokens_within_the_area(size, options, expected):
    assert reference_size(size, 8, **options) == expected


@pytest.mark.parametrize("size", [(1, 40), (10000, 40), (7, 7)])
def test_pictures_too_small_or_too_large_are_refused(pipe, size):
    with pytest.raises(
        LayoutError, match=rf"reference 1: a side must have 8 \(one token\).*found {size[0]} x {size[1]}"
    ):
        with_references(pipe, [RED, Image.new("RGB", size)])


def test_pictures_come_from_files_too(pipe, tmp_path):
    RED.save(tmp_path / "red.png")
    assert (np.asarray(load_reference(tmp_path / "red.png", "x")) == np.asarray(RED)).all()
    assert load_reference(RED.convert("RGBA"), "x").mode == "RGB"
    (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:60])
    with pytest.raises(AssetError, match=r"reference 0 \(.*torn.png\): the picture cannot be decoded"):
        with_references(pipe, [tmp_path / "torn.png"])
    with pytest.raises(AssetError, match=r"reference 0 .*'none.png' is missing"):
        with_references(pipe, [str(tmp_path / "none.png")])
    with pytest.raises(AssetError, match="reference 0: give a PIL picture or a path; found int"):
        with_references(pipe, [3])


@pytest.mark.parametrize(
    ("pictures", "options", "error", "message"),
    [
        ([[RED], [RED, BLUE]], {}, LayoutError, "number of references must be the same.*sample 0: 1; sample 1: 2"),
        (
            [[RED], [picture((0, 0, 0), 16, 16)]],
            {},
            LayoutError,
            "sizes of references.*sample 0: 24 x 16; sample 1: 16 x 16",
        ),
        (
            [[RED], [RED]],
            {"positions": "region", "regions": [[LEFT], [ac.Region(box=(0, 0, 1, 1), reference=0)]]},
            LayoutError,
            "places of references must be the same.*positions='corner'",
        ),
        (
            [RED],
            {"positions": "regions"},
            ControlError,
            "positions must be one of corner, region, apart; found 'regions'",
        ),
        (
            [RED],
            {"positions": "region", "regions": [LEFT, ac.Region("other", reference=0)]},
            ControlError,
            "Reference 0 has two places: 'other'",
        ),
    ],
)
def test_what_cannot_be_is_said(pipe, pictures, options, error, message):
    with pytest.raises(error, match=message):
        with_references(pipe, pictures, **options)


def test_pipelines_without_references_are_refused_with_those_that_have_them():
    stranger = object.__new__(StableDiffusionPipeline)
    with pytest.raises(
        UnsupportedModelError, match=r"StableDiffusionPipeline follows no reference picture.*FluxPipeline"
    ):
        with_references(stranger, [RED])


def test_calls_that_do_not_fit_the_references_are_refused(pipe):
    with pytest.raises(ControlError, match="follows 1 references of its own; leave `image` out"):
        draw(with_references(pipe, [RED]), image=BLUE)
    with pytest.raises(ControlError, match="references for 2 samples, but the batch has 1 rows"):
        draw(with_references(pipe, [[RED], [BLUE]]))
