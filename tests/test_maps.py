"""Maps put together and turned into masks: the identities of reading attention, (a) 7 and 8, on plain tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import attnctrl as ac
from attnctrl import maps
from attnctrl.layout import Layout
from attnctrl.maps.cluster import spread_by
from attnctrl.maps.keys import Keys
from attnctrl.maps.store import Store, resized


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_of(store: Store) -> int:
    return sum(t.latest.nbytes + (0 if t.past is None else t.past.nbytes) for t in store.tracks.values())


def filled(over, steps, layers=("a",)):
    """A store that saw `steps`: (step, map) pairs, in every layer."""
    store = Store(over)
    for step, value in steps:
        store.begin(step)
        for layer in layers:
            store.put(layer, "g", value)
    return store


def test_7_the_mean_over_layers_of_equal_maps_is_the_map():
    value = rand(2, 1, 4, 6)
    assert torch.allclose(filled("mean", [(0, value)], ("a", "b", "c")).mean("g", (4, 6)), value)


def test_7_layers_of_several_sizes_meet_on_the_finest_grid():
    store = Store()
    store.begin(0)
    store.put("coarse", "g", torch.full((1, 1, 2, 3), 0.25))
    store.put("fine", "g", torch.full((1, 1, 4, 6), 0.75))
    assert store.grid == (4, 6)
    assert torch.allclose(store.mean("g", store.grid), torch.full((1, 1, 4, 6), 0.5))


@pytest.mark.parametrize("grid", [(3, 5), (8, 12), (4, 6), (1, 1)])
def test_7_resizing_keeps_constants_and_shrinking_averages(grid):
    constant = torch.full((2, 1, 4, 6), 0.3)
    assert torch.allclose(resized(constant, grid), torch.full((2, 1, *grid), 0.3))
    checkers = (torch.arange(8)[:, None] + torch.arange(8)).fmod(2).float()
    assert (resized(checkers, (2, 2)) - 0.5).abs().max() < 0.05


def test_7_steps_are_put_together_as_asked():
    values = [rand(1, 1, 2, 2, seed=n) for n in range(5)]
    steps = list(enumerate(values))
    assert torch.allclose(filled("mean", steps).value("a", "g"), torch.stack(values).mean(0))
    assert torch.equal(filled("last", steps).value("a", "g"), values[-1])
    moving = values[0]
    for value in values[1:]:
        moving = 0.7 * moving + 0.3 * value
    assert torch.allclose(filled(0.7, steps).value("a", "g"), moving)


def test_7_the_store_does_not_grow_with_steps():
    sizes = [
        bytes_of(filled("mean", [(n, rand(1, 1, 8, 8, seed=n)) for n in range(count)], ("a", "b"))) for count in (2, 40)
    ]
    assert sizes[0] == sizes[1] == 2 * 2 * 8 * 8 * 4


@pytest.mark.parametrize("over", ["mean", "last", 0.5])
def test_7_a_step_seen_twice_is_overwritten_not_doubled(over):
    first, wrong, right = (rand(1, 1, 2, 2, seed=n) for n in range(3))
    twice = filled(over, [(0, first), (1, wrong), (1, right)])
    once = filled(over, [(0, first), (1, right)])
    assert torch.equal(twice.value("a", "g"), once.value("a", "g"))
    assert torch.equal(twice.masses("g"), once.masses("g"))
    assert twice.masses("g").shape == (2, 1)


def test_7_an_earlier_step_begins_a_new_run():
    store = filled("mean", [(0, rand(1, 1, 2, 2)), (1, rand(1, 1, 2, 2, seed=1))])
    store.begin(0)
    store.put("a", "g", torch.ones(3, 1, 4, 4))
    assert store.steps == [0]
    assert torch.equal(store.value("a", "g"), torch.ones(3, 1, 4, 4))
    store.begin(1)
    with pytest.raises(ac.LayoutError, match="size of the picture has changed"):
        store.put("a", "g", torch.ones(1, 1, 4, 4))


def test_shares_and_stretching_are_safe_on_constant_maps():
    assert torch.equal(maps.minmax(torch.full((2, 3, 3), 0.2)), torch.zeros(2, 3, 3))
    assert torch.equal(maps.share(torch.zeros(3, 2, 2)), torch.zeros(3, 2, 2))
    stretched = maps.minmax(rand(5, 4, 6))
    assert stretched.amin() == 0
    assert torch.allclose(stretched.amax((-2, -1)), torch.ones(5))
    assert torch.allclose(maps.share(rand(3, 4, 6)).sum(0), torch.ones(4, 6))


def slow_otsu(values: np.ndarray) -> np.ndarray:
    """Every threshold tried, class by class."""
    low, high = values.min(), values.max()
    bins = np.minimum(((values - low) / (high - low) * 256).astype(int), 255)
    best, chosen = -1.0, 0
    for level in range(255):
        below, above = bins[bins <= level], bins[bins > level]
        if len(below) and len(above):
            between = len(below) * len(above) / bins.size**2 * (below.mean() - above.mean()) ** 2
            if between > best * (1 + 1e-12):
                best, chosen = between, level
    return bins > chosen


@pytest.mark.parametrize("seed", range(5))
def test_8_otsu_is_the_best_of_all_thresholds(seed):
    values = rand(3, 2, 7, 9, seed=seed) ** (1 + seed)
    found = maps.otsu(values)
    assert found.masks.shape == values.shape
    for group in range(3):
        for row in range(2):
            assert (found.masks[group, row].numpy() == slow_otsu(values[group, row].numpy())).all()
    assert not found.undecided.any()


@pytest.mark.parametrize("seed", range(3))
def test_otsu_twice_is_otsus_threshold_with_all_levelled_below_the_first(seed):
    values = rand(2, 8, 9, seed=seed) ** 2
    once, twice = maps.otsu(values).masks, maps.otsu(values, times=2, apart=0).masks
    for group in range(2):
        levelled = values[group].clamp(min=values[group][once[group]].min())
        wanted = torch.from_numpy(slow_otsu(levelled.numpy()))
        assert torch.equal(twice[group], wanted)
        assert 0 < wanted.sum() < once[group].sum()
    # two values cannot be parted twice, one not at all
    two = torch.where(rand(4, 6) > 0.6, 0.31, 0.30)
    again = maps.otsu(torch.stack([two, torch.full((4, 6), 0.3)]), times=3)
    assert torch.equal(again.masks[0], two > 0.305)
    assert again.undecided.tolist() == [False, True]
    with pytest.raises(ac.ControlError, match="times=0"):
        maps.otsu(values, times=0)


def test_attended_takes_what_leads_leaves_out_halos_and_follows_affinities():
    halo = torch.tensor([[0.0, 0.55, 1.0, 0.9, 0.5, 0.0, 0.0, 0.0]])
    assert maps.otsu(halo).masks.int().tolist() == [[0, 1, 1, 1, 1, 0, 0, 0]]
    assert maps.attended(halo[None]).masks.int().tolist() == [[[0, 0, 1, 1, 0, 0, 0, 0]]]
    # what is nearly even inside stays whole: .1 is less than three tenths of .95
    even = torch.tensor([[0.0, 0.0, 1.0, 0.9, 0.9, 1.0, 0.0, 0.0]])
    assert maps.attended(even[None]).masks.int().tolist() == [[[0, 0, 1, 1, 1, 1, 0, 0]]]
    assert maps.otsu(even, times=2, apart=0.1).masks.int().tolist() == [[0, 0, 1, 0, 0, 1, 0, 0]]
    # both words draw both subjects; each the one on which it leads
    both = torch.tensor([[[1.0, 1.0, 0.0, 0.8, 0.8, 0.0]], [[0.8, 0.8, 0.0, 1.0, 1.0, 0.0]]])
    assert maps.attended(both).masks.int().tolist() == [[[1, 1, 0, 0, 0, 0]], [[0, 0, 0, 1, 1, 0]]]
    # ground that one of two faint maps leads on is neither's
    faint = torch.tensor([[[0.2, 0.2, 0.2, 0.2, 0.2, 1.0]], [[1.0, 0.0, 0.0, 0.0, 0.0, 0.1]]])
    assert maps.attended(faint).masks.int().tolist() == [[[0, 0, 0, 0, 0, 1]], [[1, 0, 0, 0, 0, 0]]]
    # a token that the words miss joins those that it attends to
    word = torch.tensor([[[1.0, 0.9, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    cells = torch.zeros(4, 1, 8)
    cells[0, 0, :3], cells[2, 0, 3:] = 1.0, 1.0
    assert maps.attended(word).masks.int().tolist() == [[[1, 1, 0, 0, 0, 0, 0, 0]]]
    assert maps.attended(word, cells, (1, 4)).masks.int().tolist() == [[[1, 1, 1, 0, 0, 0, 0, 0]]]
    # spread maps overlap; a token is that of the greatest
    two = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 1.0]]])
    mixed = torch.tensor([[[8.0, 6.0, 2.0, 1.0]], [[1.0, 2.0, 6.0, 8.0]]])
    assert maps.attended(two, mixed, (1, 2)).masks.int().tolist() == [[[1, 1, 0, 0]], [[0, 0, 1, 1]]]
    nothing = maps.attended(torch.full((2, 1, 4), 0.3))
    assert not nothing.masks.any()
    assert nothing.undecided.all()
    with pytest.raises(ac.ControlError, match="not those of 2 x 4 cells"):
        maps.attended(word, cells, (2, 4))


def test_8_a_map_of_two_values_is_parted_exactly_and_a_constant_one_is_undecided():
    two = torch.where(rand(4, 6) > 0.6, 0.31, 0.30)
    masks, undecided = maps.otsu(torch.stack([two, torch.full((4, 6), 0.3)]))
    assert torch.equal(masks[0], two > 0.305)
    assert undecided.tolist() == [False, True]
    assert not masks[1].any()
    ac.Region("subject", mask=masks[0])
    assert maps.threshold(torch.zeros(2, 3, 3)).undecided.all()
    assert torch.equal(maps.threshold(two, 0.5).masks, two > 0.305)


def test_8_the_largest_share_parts_the_grid():
    values = rand(3, 4, 6)
    masks, undecided = maps.argmax(values)
    assert torch.equal(masks.int().argmax(0), values.argmax(0))
    assert (masks.sum(0) == 1).all()
    assert not undecided.any()
    shares = maps.share(values).sort(0, descending=True).values
    for options, background in (
        ({"floor": 0.5}, shares[0] < 0.5),
        ({"margin": 0.2}, shares[0] - shares[1] < 0.2),
        ({"sinks": 1}, values.argmax(0) == 2),
    ):
        found = maps.argmax(values, **options).masks
        assert torch.equal(~found.any(0), background)
        assert len(found) == 3 - options.get("sinks", 0)
        assert background.any()
        assert not background.all()
    assert maps.argmax(torch.ones(2, 3, 3)).undecided.all()
    assert maps.argmax(torch.tensor([3.0, 1.0])[:, None, None].expand(2, 3, 3)).undecided.all()
    with pytest.raises(ac.ControlError, match="two groups at least"):
        maps.argmax(values[:1])


BLOCKS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 1, 1]])
"""Three blocks of a 3 x 4 grid, the last one background."""


def block_diagonal():
    """Row-stochastic [12, 12]: tokens attend to those of their own block."""
    label = BLOCKS.flatten()
    table = (label[:, None] == label).float() * (0.5 + rand(12, 12))
    return table / table.sum(1, keepdim=True)


def seeds():
    """One token of each of the first two blocks is known."""
    known = torch.zeros(2, 3, 4)
    known[0, 0, 0] = known[1, 2, 3] = 1
    return known


def test_8_clusters_of_block_diagonal_attention_are_the_blocks():
    features = block_diagonal().T.reshape(12, 3, 4)
    label = maps.kmeans(features.flatten(1).T, 3)
    assert all(len(label[BLOCKS.flatten() == block].unique()) == 1 for block in range(3))
    assert len(label.unique()) == 3
    assert torch.equal(label, maps.kmeans(features.flatten(1).T, 3))
    masks, undecided = maps.cluster(features, seeds(), clusters=3, floor=0.1)  # one token of six is known
    assert torch.equal(masks, torch.stack([BLOCKS == 0, BLOCKS == 1]))
    assert not undecided.any()
    assert maps.cluster(features, torch.ones(2, 3, 4), clusters=3, floor=0).undecided.all()
    assert maps.cluster(features, seeds(), clusters=3, floor=0.9).undecided.all()


def test_8_spreading_along_block_diagonal_attention_fills_the_blocks():
    table = block_diagonal()
    masks, undecided = maps.propagate(lambda values: table @ values, seeds(), power=4)
    assert torch.equal(masks, torch.stack([BLOCKS == 0, BLOCKS == 1]))
    assert not undecided.any()
    assert maps.propagate(lambda values: table @ values, torch.ones(2, 3, 4)).undecided.all()


def test_8_a_row_stochastic_product_stays_between_least_and_greatest():
    features = rand(6, 5, 7) * (rand(6, 5, 7, seed=1) > 0.5)
    features[:, 2, 3] = 0
    spread = maps.affinity(features, (2, 3))
    values = rand(2, 5, 7, seed=2)
    for power in (1, 3):
        found = spread_by(spread, values, power)
        assert (found.amin((1, 2)) >= values.amin((1, 2)) - 1e-6).all()
        assert (found.amax((1, 2)) <= values.amax((1, 2)) + 1e-6).all()
    assert torch.allclose(spread_by(spread, torch.ones(1, 5, 7), 4), torch.ones(1, 5, 7))
    assert torch.equal(spread_by(spread, values, 0), values)
    with pytest.raises(ac.ControlError, match="are not those of 3 x 3 cells"):
        maps.affinity(features, (3, 3))


def test_as_many_cells_as_tokens_are_the_whole_attention():
    table = block_diagonal()
    exact = spread_by(lambda values: table @ values, rand(2, 3, 4), 3)
    by_cells = spread_by(maps.affinity(table.T.reshape(12, 3, 4), (3, 4)), rand(2, 3, 4), 3)
    assert torch.allclose(exact, by_cells, atol=1e-6)


def test_points_that_are_alike_are_one_cluster():
    assert maps.kmeans(torch.ones(6, 3), 4).tolist() == [0] * 6
    with pytest.raises(ac.ControlError, match="one cluster or more"):
        maps.kmeans(torch.ones(6, 3), 0)


def test_keys_are_columns_over_the_layout():
    layout = Layout.of(text=4, image=(2, 4), references=((1, 2),) * 11)
    expected = {
        "text": range(4), "image": range(4, 12), "references": range(12, 34), "reference.1": range(14, 16), "reference.10": range(32, 34),
    }  # fmt: skip
    for name, tokens in expected.items():
        assert Keys(name, name).columns(layout, 0)[:, 0].nonzero().flatten().tolist() == list(tokens)
    assert Keys("x", "reference.11").columns(layout, 0) is None
    words = Keys("x", None, (((0, 2),), ((3, 4),)))
    assert [words.columns(layout, prompt)[:, 0].nonzero().flatten().tolist() for prompt in (0, 1)] == [[0, 1], [3]]
    with pytest.raises(ac.LayoutError, match="not in the encoded prompt, which has 4"):
        Keys("x", None, (((3, 5),),)).columns(layout, 0)
    cells = Keys("x", maps.Cells(1, 2)).columns(layout, 0)
    assert cells[4:12].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]] * 2
    assert Keys("x", maps.Cells(3, 1)).columns(layout, 0) is None


def test_heat_is_brightest_where_the_map_is_greatest():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 2.0
    drawn = maps.overlay(Image.new("RGB", (40, 80), (90, 90, 90)), heat)
    assert drawn.size == (40, 80)
    light = np.asarray(drawn.convert("L"))
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert (y // 20, x // 10) == (1, 2)
    assert (light[60:] == light[79, 0]).all()
    with pytest.raises(ac.LayoutError, match=r"one map \[h, w\]; found \(1, 4, 4\)"):
        maps.overlay(drawn, heat[None])
    sheet = maps.legend(drawn, {"a": heat, "b": heat}, side=64)
    assert sheet.width > 3 * 32
