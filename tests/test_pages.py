"""Measured figures of the pages are those stored, and are written where a page asks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from attnctrl.errors import AssetError
from attnctrl.toybox import pages
from attnctrl.toybox.tables import TABLES, Each, Table

ROOT = Path(__file__).parents[1]


def entry(vanilla: float, controlled: float | None = None, ci95: list[float] | None = None) -> dict:
    return {"vanilla": vanilla, "controlled": controlled, "delta": None, "ci95": ci95, "better": "higher"}


SUITE = {"metrics": {"binding": entry(0.25, 0.5, [0.125, 0.375]), "cfg.binding": entry(0.25)}, "n": 8}
TIMES = {
    "rows": [
        {"case": "two halves, phase A", "ours_s": 1.0, "dense_s": 4.0, "unmasked_s": 2.0, "plan_bytes": 2_500_000_000},
        {"case": "none", "ours_s": 3.0, "dense_s": 3.0, "unmasked_s": 2.0, "plan_bytes": 0},
    ]
}
RESULTS = {"one": pages.figures(SUITE), "times": pages.figures(TIMES)}


def test_the_pages_are_what_the_results_say() -> None:
    found = pages.pages(ROOT)
    assert {"README.md", "perturb.md", "subjects.md"} <= {path.name for path in found}
    for path, (now, then) in found.items():
        assert now == then, f"{path.name}: run `make results`"


def test_every_table_stands_in_one_page_and_has_rows() -> None:
    texts = [path.read_text(encoding="utf-8") for name in pages.PAGES for path in ROOT.glob(name)]
    markers = [name for text in texts for name in re.findall(r"<!-- table: (.*?) -->", text)]
    assert sorted(markers) == sorted(TABLES)
    results = pages.stored(ROOT / pages.RESULTS)
    assert [name for name, table in TABLES.items() if len(pages.lines(table, results)) < 4] == []


def test_a_figure_that_was_changed_by_hand_is_found_and_mended(tmp_path: Path, capsys) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / pages.RESULTS).symlink_to(ROOT / pages.RESULTS)
    good = (ROOT / "README.md").read_text(encoding="utf-8")
    page = tmp_path / "README.md"
    for right in (r"(?<=\| )\d\.\d{3}(?= \|)", r"[-+.\d%e]+(?=<!-- = )", r"(?<=^\| )two halves, phase A"):
        bad, changed = re.subn(right, "77.7", good, count=1, flags=re.MULTILINE)
        assert changed == 1
        page.write_text(bad, encoding="utf-8")
        assert pages.main(["--root", str(tmp_path), "--check"]) == 1
        taken = re.findall(r"^-(?!-)(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
        assert taken == [line for line in bad.splitlines() if "77.7" in line]
        assert page.read_text(encoding="utf-8") == bad
        assert pages.main(["--root", str(tmp_path)]) == 0
        assert page.read_text(encoding="utf-8") == good
        assert capsys.readouterr().out == f"{page}\n"
        assert pages.main(["--root", str(tmp_path), "--check"]) == 0


def test_what_a_result_says() -> None:
    assert RESULTS["one"]["binding"]["low"] == 0.125
    assert RESULTS["one"]["all"] == {"n": 8}
    assert RESULTS["times"]["two_halves_phase_A"]["of_dense"] == 0.25
    assert RESULTS["times"]["none"]["of_unmasked"] == 1.5
    assert RESULTS["times"]["max"]["plan_gb"] == 2.5
    assert (RESULTS["times"]["min"]["ours_s"], RESULTS["times"]["median"]["ours_s"]) == (1.0, 2.0)
    steps = [{"method": name, "steps": 5 * size, "gain": size or None} for name in ("a", "b") for size in (0, 1, 3)]
    told = pages.figures({"rows": steps[:5]})
    assert told["a_15"]["gain"] == 3
    assert (told["a_max"]["gain"], told["b_max"]["gain"], told["median"]["gain"]) == (3, 1, 1)


def test_what_a_confirmation_says() -> None:
    over = {"all of joint:1": {"delta": 0.1, "ci95": [-0.2, 0.4]}}
    rows = [{"name": "first 1", "delta": 0.3, "ci95": [0.2, 0.5], "over": over}]
    told = pages.figures({"confirm": {"rows": rows}})["first_1"]
    assert [told[key] for key in ("low", "high", "over_delta", "over_low", "over_high")] == [0.2, 0.5, 0.1, -0.2, 0.4]


def test_a_row_that_was_not_measured_is_left_out() -> None:
    held = "{controlled:.3f} ({low:+.3f} .. {high:+.3f})"
    rows = [(key, ("one", key, "{vanilla:.0%}"), ("one", key, held)) for key in ("binding", "cfg.binding", "gone")]
    rows += [("other", ("two", "binding", "{vanilla}"), "1"), ("last", "1", ("one", "all", "{n}"))]
    assert pages.lines(Table(("a", "b", "c"), rows), RESULTS) == [
        "| a | b | c |",
        "|---|---|---|",
        "| binding | 25% | 0.500 (+0.125 .. +0.375) |",
        "| last | 1 | 8 |",
    ]
    each = Each(("case", "time"), "times", ("{case}", "{of_dense:.2f} x"))
    assert pages.lines(each, RESULTS)[2:] == ["| two halves, phase A | 0.25 x |", "| none | 1.00 x |"]


def test_markers_are_filled_and_all_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "TABLES", {"mine": Table(("a",), [("x",), (("one", "all", "{n}"),)])})
    page = "Of w=7<!-- = one binding {low:+.3f} -->, 3 and\n<!-- = one all {n} -->.\n<!-- table: mine -->\n{}\n| 9\n"
    want = page.replace("w=7<", "w=+0.125<").replace("\n<!-- =", "\n8<!-- =")
    for old in ("", "| a |\n|---|\n| gone |\n"):
        assert pages.written(page.replace("{}", old), RESULTS) == want.replace("{}", "| a |\n|---|\n| x |\n| 8 |\n")


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("<!-- table: none -->\n", "<!-- table: none --> names no table; there are layout toy-sd, "),
        ("1<!-- = two binding {vanilla} -->", "<!-- = two binding {vanilla} --> names what is not stored"),
        ("1<!-- = one gone {vanilla} -->", "names what is not stored"),
        ("1<!-- = one cfg.binding {controlled} -->", "names what is not stored"),
        ("1<!-- = one binding -->", "1 figures are marked, 0 can be read"),
    ],
)
def test_a_marker_that_leads_nowhere_is_an_error(page: str, told: str) -> None:
    with pytest.raises(AssetError, match=re.escape(told)):
        pages.written(page, RESULTS)


def test_every_result_has_its_command(tmp_path: Path) -> None:
    (tmp_path / "idle-cpu.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "one.json").write_text(json.dumps({**SUITE, "command": "attnctrl eval layout"}))
    commands = pages.stored(tmp_path)["commands"]
    assert commands["one"] == {"file": "one.json", "command": "attnctrl eval layout"}
    assert commands["idle-cpu"]["command"] == "attnctrl bench idle --format json"
    (tmp_path / "two.json").write_text(json.dumps(SUITE))
    with pytest.raises(AssetError, match=r"two\.json has no 'command'"):
        pages.stored(tmp_path)
