"""Pictures for people: where lines, labels and pictures land."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from attnctrl.pictures import PALETTE, PAPER, draw_regions, enlarge, grid
from attnctrl.region import Region

GRAY = (120, 120, 120)


def flat(color, size=(10, 10)):
    return Image.new("RGB", size, color)


def where(image, color):
    return np.all(np.asarray(image) == color, axis=-1)


def test_small_pictures_grow_by_whole_pixels():
    image = flat((0, 0, 0), (2, 1))
    image.putpixel((1, 0), (255, 0, 0))
    grown = enlarge(image, 8)
    assert grown.size == (8, 4)
    assert where(grown, (255, 0, 0)).tolist() == [[False] * 4 + [True] * 4] * 4


def test_a_box_is_outlined_on_its_own_pixels_and_the_original_is_untouched():
    image = flat(GRAY)
    drawn = draw_regions(image, [Region("a", box=(0.2, 0.3, 0.8, 0.9))], names=False)
    expected = np.zeros((10, 10), dtype=bool)
    expected[3:9, 2:8] = True
    expected[4:8, 3:7] = False
    assert (where(drawn, PALETTE[0]) == expected).all()
    assert where(drawn, GRAY).sum() == 100 - expected.sum()
    assert where(image, GRAY).all()


def test_a_mask_is_outlined_inside():
    mask = np.zeros((10, 10), dtype=bool)
    mask[2:7, 2:7] = True
    drawn = draw_regions(flat(GRAY), [Region("a", box=(0, 0, 0.1, 0.1)), Region("b", mask=mask)], names=False)
    expected = mask.copy()
    expected[3:6, 3:6] = False
    assert (where(drawn, PALETTE[1]) == expected).all()


def test_names_stay_inside_the_picture():
    drawn = draw_regions(flat(GRAY, (60, 60)), [Region("a very long name of a thing", box=(0.9, 0.95, 1, 1))])
    plate = where(drawn, PALETTE[0])
    assert plate.sum() > 300
    assert drawn.size == (60, 60)


def test_the_grid_puts_every_picture_in_its_cell():
    colors = [[(250, 0, 0), (0, 250, 0), (0, 0, 250)], [(250, 250, 0), (0, 250, 250), (250, 0, 250)]]
    sheet = grid(
        [[flat(c) for c in row] for row in colors],
        ["one", "two"],
        ["a", "b", "c"],
        groups=[("x", 1), ("y", 2)],
        side=40,
    )
    corners = {}
    for j, row in enumerate(colors):
        for i, color in enumerate(row):
            rows, columns = np.nonzero(where(sheet, color))
            assert len(rows) == 40 * 40
            assert (np.ptp(rows), np.ptp(columns)) == (39, 39)
            corners[j, i] = (rows.min(), columns.min())
    assert corners[0, 0][0] == corners[0, 2][0] < corners[1, 0][0] - 39
    assert corners[0, 0][1] == corners[1, 0][1] < corners[0, 1][1] - 39 < corners[0, 2][1] - 79
    above = np.asarray(sheet)[: corners[0, 0][0]]
    assert (above != PAPER).any()  # headings and labels
    left = np.asarray(sheet)[:, : corners[0, 0][1]]
    assert (left != PAPER).any()


def test_the_grid_needs_a_label_for_everything():
    with pytest.raises(ValueError, match="give one label to each"):
        grid([[flat(GRAY)]], ["one", "two"], ["a"])
    with pytest.raises(ValueError, match="give one label to each"):
        grid([[flat(GRAY)], []], ["one", "two"], ["a"])
    with pytest.raises(ValueError, match="headings over 2 columns; there are 1"):
        grid([[flat(GRAY)]], ["one"], ["a"], groups=[("x", 2)])
