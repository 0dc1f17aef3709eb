"""The one way of measuring: tasks of two splits, pairs of pictures, and what every result says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from attnctrl.pipelines.runner import Runner

from attnctrl.errors import SelectionError
from attnctrl.metrics.frechet import frechet_distance
from attnctrl.metrics.memory import peak_bytes
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.suite import COMMON, Options, Picture, Whole, build_controls, diversity, measure, time_ratio
from attnctrl.toybox.suites_layout import LAYOUT, VARIANTS, worded_preset


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(tiny_pipeline(), size=(64, 64), steps=2, batch=2)


RATIOS = {"time_ratio", "memory_ratio"}
COUNTS = replace(
    LAYOUT,
    name="counts",
    sample=lambda rng: float(rng.random()),
    pictures=lambda task, seed: [Picture(f"a red circle {seed}", seed), Picture("a blue star", seed)],
    values=lambda task, images, plain: {"task": task, "same": float(np.array_equal(images[0], plain[0]))},
    better={"task": "higher", "same": "lower"},
    fidelity=lambda task, images: 0.25,
    whole={
        "pictures": Whole("lower", lambda task, images: len(images), lambda read: float(len(read) + 10 * sum(read)))
    },
    controls={},
    variants={},
)


def test_splits_have_other_tasks_and_suites_other_ones_than_each_other():
    assert LAYOUT.task("test", 3) == LAYOUT.task("test", 3)
    tasks = {(split, index): LAYOUT.task(split, index) for split in ("test", "tune") for index in range(40)}
    seeds = [seed for _, seed in tasks.values()]
    assert len(set(seeds)) == 80
    assert min(seeds) >= 77_000_000
    assert all(tasks["test", index][0] != tasks["tune", index][0] for index in range(40))
    assert replace(COUNTS, name="other").task("test", 0)[0] != COUNTS.task("test", 0)[0]


def test_settings_are_chosen_on_the_other_split():
    with pytest.raises(ValueError, match="chosen on split 'tune', never on 'test'"):
        Options(controls={"regions": {}})
    Options(split="tune", controls={"regions": {}})


def test_a_suite_without_controls_gives_plain_values_with_intervals(runner):
    steps = []
    found = measure(COUNTS, runner, "tiny", 3, lambda done, total: steps.append((done, total)))
    assert list(found) == ["suite", "model", "n", "seconds", "metrics", "split"]
    assert (found["suite"], found["model"], found["n"], found["split"]) == ("counts", "tiny", 3, "test")
    assert set(found["metrics"]) == {"task", "same", "pictures", *COMMON}
    tasks = [COUNTS.task("test", index)[0] for index in range(3)]
    entry = found["metrics"]["task"]
    assert (entry["vanilla"], entry["controlled"], entry["better"]) == (pytest.approx(np.mean(tasks)), None, "higher")
    assert min(tasks) <= entry["ci95"][0] <= entry["ci95"][1] <= max(tasks)
    assert found["metrics"]["pictures"] == {
        "vanilla": 63.0, "controlled": None, "delta": None, "ci95": [63.0, 63.0], "better": "lower",
    }  # fmt: skip
    assert found["metrics"]["prompt_fidelity"]["vanilla"] == 0.25
    assert found["metrics"]["same"]["vanilla"] == 1
    # both pictures of a task are drawn in one batch
    assert steps == [(2, 6), (4, 6), (6, 6)]
    assert json.loads(json.dumps(found)) == found


def test_control_is_compared_on_the_same_seeds(runner):
    same = lambda task, images, plain: {"same": float(np.array_equal(images[0], plain[0]))}  # noqa: E731
    found = measure(replace(LAYOUT, values=same, better={"same": "lower"}), runner, "tiny", 3, None, Options(rows=True))
    assert set(found["metrics"]) == {"same", *COMMON, *RATIOS}
    assert (found["metrics"]["same"]["vanilla"], found["metrics"]["same"]["controlled"]) == (1, 0)
    for name in RATIOS:
        entry = found["metrics"][name]
        assert entry["vanilla"] == 1
        assert entry["controlled"] > 0
        assert (entry["ci95"], entry["better"]) == (None, "lower")
    rows = found["rows"]
    assert [row["task"] for row in rows] == [0, 1, 2]
    assert rows[1]["prompts"] == [LAYOUT.task("test", 1)[0].prompt]
    assert [row["controlled"]["same"] for row in rows] == [0, 0, 0]


def test_the_layout_suite_measures_what_it_names(runner):
    found = measure(LAYOUT, runner, "tiny", 2)["metrics"]
    assert set(found) == {*LAYOUT.better, *COMMON, *RATIOS}
    assert found["background_similarity"]["vanilla"] == 1
    assert found["background_similarity"]["controlled"] < 1
    for name, entry in found.items():
        assert list(entry) == ["vanilla", "controlled", "delta", "ci95", "better"]
        assert entry["delta"] == pytest.approx(entry["controlled"] - entry["vanilla"])
        assert entry["better"] == {**LAYOUT.better, **COMMON}.get(name, "lower")


def test_the_time_is_that_of_one_interleaved_run(runner, monkeypatch):
    """Both ways are run in it, the plain one without controls."""
    drawn = []

    def clock(calls, repeats):
        drawn.extend(call() for call in calls.values())
        assert repeats >= 3
        return {"plain": 2.0, "steered": 3.0}

    monkeypatch.setattr("attnctrl.toybox.suite.interleaved", clock)
    wanted = [LAYOUT.pictures(*LAYOUT.task("test", 0))]
    assert time_ratio(runner, wanted, VARIANTS["separate"]) == 1.5
    plain = runner.with_steps(4).draw([wanted[0][0].prompt], [wanted[0][0].seed])
    assert np.array_equal(drawn[0][0], plain[0])
    assert not np.array_equal(drawn[1][0], plain[0])


def test_variants_and_other_settings_come_by_name(runner):
    found = measure(LAYOUT, runner, "tiny", 1, None, Options(variants=True))["metrics"]
    names = {*LAYOUT.better, *COMMON, *RATIOS}
    assert set(found) == {prefix + name for name in names for prefix in ("", *(f"{one}." for one in VARIANTS))}
    assert found["regions_only.background_similarity"] != found["parted_always.background_similarity"]
    other = measure(LAYOUT, runner, "tiny", 1, None, Options(split="tune", controls=VARIANTS["regions_only"]))
    assert other["split"] == "tune"
    assert other["metrics"]["background_similarity"]["controlled"] < 1


def test_single_variants_come_by_name(runner):
    found = measure(LAYOUT, runner, "tiny", 1, None, Options(variants=["separate"]))["metrics"]
    assert {name.rpartition(".")[0] for name in found} == {"", "separate"}
    with pytest.raises(SelectionError, match="suite 'layout' has no variant 'seperate'; it has separate, regions"):
        measure(LAYOUT, runner, "tiny", 1, None, Options(variants=["seperate"]))


def test_control_is_compared_with_its_rivals_pair_by_pair(runner):
    """The difference of what stands under the variant's name, with an interval of its own; whole metrics as well."""
    count = {
        "coloured": Whole("higher", lambda task, images: float(images[0].std()), lambda read: float(np.mean(read)))
    }
    suite = replace(LAYOUT, rivals=("separate", "regions_only"), whole=count)
    found = measure(suite, runner, "tiny", 3, None, Options(variants=["separate"], rows=True))
    metrics, rows = found["metrics"], found["rows"]
    assert {name.rpartition(".")[0] for name in metrics} == {"", "separate", "over_separate"}
    assert "over_separate.time_ratio" not in metrics
    for name in ("background_similarity", "coloured"):
        entry = metrics[f"over_separate.{name}"]
        assert entry["vanilla"] == metrics[f"separate.{name}"]["controlled"]
        assert entry["controlled"] == metrics[name]["controlled"]
        assert entry["delta"] == pytest.approx(entry["controlled"] - entry["vanilla"])
    differences = [
        row["controlled"]["background_similarity"] - row["separate"]["background_similarity"] for row in rows
    ]
    low, high = metrics["over_separate.background_similarity"]["ci95"]
    assert min(differences) <= low <= high <= max(differences)
    assert max(differences) > min(differences)
    plain = measure(suite, runner, "tiny", 1)["metrics"]
    assert not [name for name in plain if name.startswith("over_")]


def test_a_grid_shows_all_ways_of_drawing(runner):
    seen = []
    measure(LAYOUT, runner, "tiny", 2, None, Options(grid=seen.append))
    (grid,) = seen
    assert grid.size[0] > 2 * 192
    assert grid.size[1] > 2 * 192


def test_controls_of_a_batch_have_the_regions_of_each_picture(runner):
    pictures = [LAYOUT.pictures(*LAYOUT.task("test", index))[0] for index in range(2)]
    isolate, regions = build_controls(VARIANTS["separate"], runner, pictures)
    assert (isolate.name, isolate.window, isolate.background) == ("isolate", (0.0, 0.5), "shared")
    assert isolate.regions == ()
    assert [[one.prompt for one in scene] for scene in regions.regions] == [
        [one.prompt for one in picture.regions] for picture in pictures
    ]


def test_layouts_are_measured_as_the_pipeline_draws_them(runner):
    """Regions own words of the prompt: "a blue heart left, a red star right, ..." has five tokens each and a comma."""
    pictures = [LAYOUT.pictures(*LAYOUT.task("test", index))[0] for index in range(2)]
    isolate, regions = build_controls(worded_preset, runner, pictures)
    assert (isolate.name, isolate.window, isolate.background) == ("isolate", (0.0, 0.5), "shared")
    assert regions.name == "group_isolation"
    for scene, picture in zip(regions.regions, pictures, strict=True):
        words = picture.prompt.replace(",", " ,").split()
        for region, box in zip(scene, picture.regions, strict=True):
            ((start, stop),) = region.spans
            assert " ".join(words[start:stop]) == region.prompt
            assert region.box == box.box


def test_diversity_is_the_distance_of_thumbnails():
    black, gray = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 51, np.uint8)
    assert diversity([black, gray]) == pytest.approx(0.2)
    assert diversity([black, black, gray]) == pytest.approx(0.4 / 3)
    assert diversity([black]) == 0


def test_peak_bytes_follows_what_lives():
    def three() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        view = b.view(10, 100)
        del b
        c = view * 2
        del view
        torch.zeros(500).add_(c[0, 0])

    assert peak_bytes(three) == 8000
    assert peak_bytes(lambda: torch.zeros(10)) == 40
    given = torch.zeros(1000)
    assert peak_bytes(lambda: given.add_(1)) == 0


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3)) * [1, 2, 3]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + np.array([1, 2, 2])) == pytest.approx(9)
    # |m - m'|^2 + sum (s - s')^2 for independent axes
    centred = a - a.mean(0)
    s = np.cov(centred, rowvar=False)
    values = np.linalg.eigvalsh(s)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(float(values.sum()))
    with pytest.raises(ValueError, match=r"found \(1, 3\), \(4000, 3\)"):
        frechet_distance(a[:1], a)
