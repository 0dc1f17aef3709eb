"""Parts of a measurement that several processes drew, compared as one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from attnctrl.pipelines.runner import Runner

from attnctrl.errors import AssetError
from attnctrl.toybox.compare import Way
from attnctrl.toybox.models.flux import tiny_pipeline
from attnctrl.toybox.pooled import main, pooled
from attnctrl.toybox.suite import Options, measure
from attnctrl.toybox.suites_sets import SUBJECTS

COMMAND = "eval --first 2, eval --first 0, python -m attnctrl.toybox.pooled"


@pytest.fixture(scope="module")
def measured():
    """(tasks, number of the first) -> what a process prints."""
    runner = Runner(tiny_pipeline(), size=(64, 64), steps=1, batch=4)

    def part(count: int, first: int = 0, **more) -> dict:
        options = Options(rows=True, first=first, variants=["shared"], **more)
        found = measure(SUBJECTS, runner, "tiny", count, None, options)
        told = {**found, "command": f"eval --first {first}", "versions": {"attnctrl": "1"}}
        return json.loads(json.dumps(told))

    return part


def test_parts_are_the_whole(measured, tmp_path, capsys):
    whole, parts = measured(3), [measured(1, first=2), measured(2)]
    files = [tmp_path / f"{number}.json" for number in range(2)]
    for path, part in zip(files, parts, strict=True):
        path.write_text(json.dumps(part))
    main([str(path) for path in files])
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], found["split"], found["command"]) == (3, "test", COMMAND)
    assert list(found["metrics"]) == list(whole["metrics"])
    ratios = {name for name in whole["metrics"] if name.endswith("_ratio")}
    assert len(ratios) == 4
    for name in set(whole["metrics"]) - ratios:
        own, other = found["metrics"][name], whole["metrics"][name]
        assert own.pop("ci95") == pytest.approx(other.pop("ci95"), abs=1e-12)
        assert own == pytest.approx(other)
    for name in ratios:
        one, two = (part["metrics"][name]["controlled"] for part in parts)
        assert found["metrics"][name]["controlled"] == pytest.approx((one + 2 * two) / 3)
        assert found["metrics"][name]["delta"] == pytest.approx((one + 2 * two) / 3 - 1)
    assert whole["metrics"]["identity_margin"]["delta"] != 0
    assert whole["metrics"]["over_shared.identity_margin"]["vanilla"] == pytest.approx(
        whole["metrics"]["shared.identity_margin"]["controlled"]
    )
    # a part by itself says something else
    assert parts[1]["metrics"]["identity_margin"] != whole["metrics"]["identity_margin"]


def test_what_is_no_part_of_the_same_is_refused(measured):
    one, other = measured(1), measured(1, first=1)
    with pytest.raises(AssetError, match='agree in \'model\'; found "other" and "tiny"'):
        pooled([one, {**other, "model": "other"}])
    with pytest.raises(AssetError, match="tasks in common; draw them with --first"):
        pooled([one, one])
    with pytest.raises(AssetError, match="--rows --format json"):
        pooled([one, {name: value for name, value in other.items() if name != "rows"}])
    (row,) = other["rows"]
    fewer = {**row, "whole": {name: read for name, read in row["whole"].items() if name != "shared"}}
    with pytest.raises(AssetError, match="different variants"):
        pooled([one, {**other, "rows": [fewer]}])


def test_what_was_read_goes_to_json_and_back():
    reads = {"frechet": [([np.array([1.0, 2.0]), np.array([0.5])], np.array([3.0])), ([], None)]}
    way = Way([{"a": 1.0}, {"a": 2.0}], reads)
    rows = [json.loads(json.dumps(way.row(index))) for index in range(2)]
    back = Way.restored(rows)
    assert back.values == ({"a": 1.0}, {"a": 2.0})
    (first, second) = back.reads["frechet"]
    assert [one.tolist() for one in first[0]] == [[1.0, 2.0], [0.5]]
    assert first[1].tolist() == [3.0]
    assert second == [[], None]


def test_files_that_are_missing_or_no_parts_end_with_a_message(tmp_path, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"suite": "layout", "rows": [{}]}))
    for path, message in ((tmp_path / "none.json", "none.json"), (broken, "Expecting"), (layout, "parts are what")):
        with pytest.raises(SystemExit) as ended:
            main([str(path)])
        assert ended.value.code == 1
        told = capsys.readouterr()
        assert message in told.err
        assert told.out == ""
