"""Ranges, coverage, labels, overlap policies and the partition into groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import attnctrl as ac
from attnctrl.errors import LayoutError
from attnctrl.families.flux import measure
from attnctrl.groups import partition
from attnctrl.layout import Layout, Measures, TokenRange
from attnctrl.region import Region, coverage, labels, membership

unit = st.floats(0, 1, allow_nan=False)


def test_ranges_follow_each_other() -> None:
    layout = Layout.of(text=5, image=(2, 3), references=[(1, 2), (2, 2)])
    assert layout.names == ("text.global", "image", "reference.0", "reference.1")
    assert layout["image"] == TokenRange("image", 5, 11, (2, 3))
    assert layout["reference.1"] == TokenRange("reference.1", 13, 17, (2, 2))
    assert (layout.tokens, layout.grid) == (17, (2, 3))
    longer = layout.with_texts([("text.region0", 3), ("text.region1", 2), ("text.pad", 1)])
    assert [(item.name, item.start, item.stop) for item in longer.ranges[:5]] == [
        ("text.global", 0, 5), ("text.region0", 5, 8), ("text.region1", 8, 10), ("text.pad", 10, 11), ("image", 11, 17),
    ]  # fmt: skip
    assert longer["reference.1"].stop == 23
    with pytest.raises(LayoutError, match=r"no tokens named 'video'.*text\.global, image"):
        layout["video"]
    with pytest.raises(LayoutError, match="without gaps"):
        Layout((TokenRange("text", 0, 2), TokenRange("image", 3, 4)))
    with pytest.raises(LayoutError, match="6 tokens but a grid of 2 x 2"):
        Layout((TokenRange("image", 0, 6, (2, 2)),))


def test_coverage_is_the_exact_area() -> None:
    half = Region(box=(0.25, 0.0, 1.0, 0.5))
    assert torch.equal(coverage(half, (1, 2)), torch.tensor([[0.25, 0.5]], dtype=torch.float64))
    assert torch.equal(coverage(Region(), (2, 2)), torch.ones(2, 2, dtype=torch.float64))
    mask = np.zeros((4, 6), dtype=np.uint8)
    mask[1:3, 1:4] = 255
    expected = torch.tensor([[1 / 6, 2 / 6], [1 / 6, 2 / 6]], dtype=torch.float64)
    assert torch.allclose(coverage(Region(mask=mask), (2, 2))[:, :1], torch.full((2, 1), 2 / 6, dtype=torch.float64))
    assert torch.allclose(coverage(Region(mask=mask), (2, 2)).sum(), expected.sum())
    # a grid that does not divide the mask
    stripes = torch.tensor([[1.0, 0.0, 1.0]])
    assert torch.allclose(coverage(Region(mask=stripes), (1, 2)), torch.tensor([[2 / 3, 2 / 3]], dtype=torch.float64))


@given(unit, unit, unit, unit, st.integers(1, 9), st.integers(1, 9))
def test_coverage_of_boxes_and_of_their_masks(a: float, b: float, c: float, d: float, height: int, width: int) -> None:
    (x0, x1), (y0, y1) = sorted((a, b)), sorted((c, d))
    if x1 - x0 < 1e-6 or y1 - y0 < 1e-6:
        return
    share = coverage(Region(box=(x0, y0, x1, y1)), (height, width))
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-9
    assert float(share.sum()) == pytest.approx((x1 - x0) * (y1 - y0) * height * width, abs=1e-9)
    assert bool(labels(Region(box=(x0, y0, x1, y1)), (height, width)).any())


def test_labels_keep_halves_and_the_best_token() -> None:
    """Two abutting boxes that meet in the middle of a token both keep it; a tiny box keeps its best token."""
    left, right = Region(box=(0, 0, 0.5, 1)), Region(box=(0.5, 0, 1, 1))
    assert labels(left, (1, 3)).tolist() == [[True, True, False]]
    assert labels(right, (1, 3)).tolist() == [[False, True, True]]
    assert labels(Region(box=(0.7, 0.0, 0.72, 0.1)), (2, 3)).tolist() == [[False, False, True], [False, False, False]]
    thirds = Region(box=(0.1 + 0.2, 0.0, 0.5, 1.0))  # 0.30000000000000004
    assert labels(thirds, (1, 5)).tolist() == [[False, True, True, False, False]]


def test_overlap_policies() -> None:
    regions = [Region(box=(0, 0, 0.75, 1)), Region(box=(0.5, 0, 1, 1))]
    rows = {
        policy: membership(regions, (1, 4), policy).int().tolist() for policy in ("union", "priority", "background")
    }
    assert rows["union"] == [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert rows["priority"] == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert rows["background"] == [[1, 1, 0, 0], [0, 0, 0, 1]]
    hidden = [Region("cat", box=(0, 0, 0.5, 1)), Region("dog", box=(0, 0, 1, 1))]
    with pytest.raises(LayoutError, match=r"overlap='priority'.*1 x 4.*left of: cat"):
        membership(hidden, (1, 4), "priority")
    assert membership([], (2, 2)).shape == (0, 4)


def test_partition_names_each_group() -> None:
    regions = [Region("cat", box=(0, 0, 0.5, 1), reference=1), Region("dog", box=(0.25, 0, 0.75, 1))]
    layout = Layout.of(text=2, image=(1, 4), references=[(1, 1), (1, 2)]).with_texts(
        [("text.region0", 1), ("text.region1", 2), ("text.pad", 1)]
    )
    atom, groups = partition(layout, membership(regions, (1, 4)), regions)
    names = [groups[index].name for index in atom.tolist()]
    assert names == [
        "prompt", "prompt", "text of cat", "text of dog", "text of dog", "padding",
        "image of cat", "image of cat + dog", "image of dog", "background", "reference 0", "reference 1", "reference 1",
    ]  # fmt: skip
    assert [groups[i].members for i in atom[6:].tolist()] == [{0}, {0, 1}, {1}, set(), set(), {0}, {0}]


def test_region_checks() -> None:
    for box in ((0, 0, 0, 1), (0.5, 0, 0.4, 1), (0, 0, 1, 2), (-0.1, 0, 1, 1), (0, 0, 1)):
        with pytest.raises(LayoutError, match=r"'cat'.*box"):
            Region("cat", box=box)
    with pytest.raises(LayoutError, match="both a box and a mask"):
        Region(box=(0, 0, 1, 1), mask=torch.ones(2, 2))
    with pytest.raises(LayoutError, match="mask is empty"):
        Region(mask=torch.zeros(2, 2))
    with pytest.raises(LayoutError, match=r"found -1\.\.1"):
        Region(mask=torch.tensor([[-1.0, 1.0]]))
    with pytest.raises(LayoutError, match=r"\[H, W\]; found shape \(2, 2, 3\)"):
        Region(mask=np.ones((2, 2, 3)))
    with pytest.raises(LayoutError, match=r"strength must be in \[0, 1\]"):
        Region(strength=1.5)
    with pytest.raises(LayoutError, match=r"\[tokens, channels\]; found \(1, 2, 3\)"):
        Region(prompt_embeds=torch.zeros(1, 2, 3))
    with pytest.raises(LayoutError, match="reference"):
        Region(reference=-1)


@pytest.mark.parametrize(
    "mask",
    [np.array([[True, False]]), np.array([[1, 0]]), np.array([[255, 0]], np.uint8), torch.tensor([[1.0, 0.0]]), None],
    ids=["bool", "0/1", "uint8", "float", "picture"],
)
def test_masks_of_all_kinds(mask: object) -> None:
    if mask is None:
        mask = Image.new("L", (2, 1))
        mask.putpixel((0, 0), 255)
    assert Region(mask=mask).mask.tolist() == [[1.0, 0.0]]


def test_regions_survive_json() -> None:
    import json

    region = Region("cat", mask=torch.rand(3, 5), name="Tom", strength=0.25, reference=2)
    back = Region.from_dict(json.loads(json.dumps(region.to_dict())))
    assert torch.equal(back.mask, region.mask)
    assert (back.prompt, back.name, back.strength, back.reference, back.label) == ("cat", "Tom", 0.25, 2, "Tom")
    assert Region.from_dict(Region("dog", box=(0, 0, 0.5, 1)).to_dict()).box == (0.0, 0.0, 0.5, 1.0)
    with pytest.raises(LayoutError, match="prompt_embeds, which are not written"):
        Region("cat", prompt_embeds=torch.zeros(1, 2)).to_dict()


def ids(*pictures: tuple[int, int, int, int, int]) -> torch.Tensor:
    rows = [(a, y + r, x + c) for a, h, w, y, x in pictures for r in range(h) for c in range(w)]
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize(
    ("pictures", "references"),
    [
        ([], []),
        ([(1, 2, 2, 0, 0)], [(2, 2)]),
        ([(1, 2, 2, 0, 0), (1, 3, 1, 0, 0)], [(2, 2), (3, 1)]),
        ([(1, 2, 2, 0, 0), (1, 2, 2, 0, 2)], [(2, 2), (2, 2)]),
        ([(1, 1, 1, 0, 0), (1, 1, 1, 0, 0)], [(1, 1), (1, 1)]),
        ([(1, 2, 2, 0, 0), (2, 2, 2, 2, 0)], [(2, 2), (2, 2)]),
        # by fractions of tokens, also below the corner
        ([(1, 2, 3, -0.5, 0.3), (1, 2, 3, -0.5, 0.3)], [(2, 3), (2, 3)]),
        # the second begins below and right of the end of the first, or beside it, or under it
        ([(1, 2, 2, 0, 0), (1, 3, 2, 4, 5)], [(2, 2), (3, 2)]),
        ([(1, 2, 2, 0, 0), (1, 2, 2, 2, 2)], [(2, 2), (2, 2)]),
        ([(1, 2, 2, 0, 0), (1, 2, 3, 2, 0)], [(2, 2), (2, 3)]),
        ([(1, 2, 2, 0, 0), (1, 2, 2, 2, 1 / 64)], [(2, 2), (2, 2)]),
        # edge to edge in order, they are one to whoever reads positions
        ([(1, 2, 2, 0, 0), (1, 2, 2, 2, 0)], [(4, 2)]),
    ],
)
def test_flux_layout_from_ids(pictures: list[tuple[int, ...]], references: list[tuple[int, int]]) -> None:
    """Latents at axis 0 = 0; references wherever axis 0 changes or the raster starts again."""
    image_ids = ids((0, 4, 3, 0, 0), *pictures)
    arguments = {
        "img_ids": image_ids,
        "hidden_states": torch.zeros(1, len(image_ids), 8),
        "encoder_hidden_states": torch.zeros(1, 7, 4),
    }
    layout = measure(None, arguments)
    assert layout == Measures(7, (4, 3), tuple(references), corner=(0.0, 0.0, 0.0))
    assert measure(None, {**arguments, "img_ids": image_ids[None]}) == layout


def test_flux_layout_refuses_ids_that_are_no_picture() -> None:
    arguments = {"hidden_states": torch.zeros(1, 4, 8), "encoder_hidden_states": torch.zeros(1, 7, 4)}
    with pytest.raises(LayoutError, match="4 image tokens but img_ids for 6"):
        measure(None, {**arguments, "img_ids": ids((0, 2, 3, 0, 0))})
    with pytest.raises(LayoutError, match="no raster"):
        measure(None, {**arguments, "img_ids": torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 3], [0, 1, 0]]).float()})
    with pytest.raises(LayoutError, match="axis 0 = 0"):
        measure(None, {**arguments, "img_ids": ids((1, 2, 2, 0, 0))})


def test_a_segmentation_map_gives_a_region_for_each_text() -> None:
    map_ = torch.zeros(8, 12, dtype=torch.uint8)
    map_[:, :6], map_[2, 9] = 3, 7
    left, dot = ac.segments(map_, {3: "sea", 7: "a boat"})
    assert (left.prompt, dot.prompt) == ("sea", "a boat")
    member = membership([left, dot], (4, 6)).reshape(2, 4, 6)
    expected = torch.zeros(2, 4, 6, dtype=torch.bool)
    # a segment smaller than a token has the token that it covers best
    expected[0, :, :3], expected[1, 1, 4] = True, True
    assert torch.equal(member, expected)
    same = ac.segments(Image.fromarray(map_.numpy()), {3: "sea", 7: "a boat"})
    assert all(torch.equal(one.mask, other.mask) for one, other in zip(same, (left, dot), strict=True))


@pytest.mark.parametrize(
    ("map_", "message"),
    [
        (torch.zeros(4, 4, 3, dtype=torch.uint8), r"found torch.uint8 of shape \(4, 4, 3\)"),
        (torch.zeros(4, 4), "whole numbers.*found torch.float32"),
        (torch.ones(4, 4, dtype=torch.int64), r"no pixel of label 3 \('sea'\); it holds 1\."),
    ],
)
def test_what_is_no_segmentation_map_is_refused(map_: torch.Tensor, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        ac.segments(map_, {3: "sea"})
