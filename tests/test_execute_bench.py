"""The benchmark of the executors measures what it says."""

from __future__ import annotations

import pytest
import torch
from execute_tools import formula, inputs, random_visibility

from attnctrl.execute import bench as benchmarks


@pytest.mark.parametrize("isolate", [True, False])
def test_bench_cases_have_the_pairs_of_the_closed_formula(isolate: bool) -> None:
    """lamic.md section 6, formulas for disjoint regions."""
    visibility = benchmarks.lamic(1000, [(0, 0, 0.4, 1), (0.5, 0.2, 0.9, 1)], isolate_regions=isolate)
    n = dict(zip(visibility.query_names, visibility.query_counts.tolist(), strict=True))
    total, hubs = sum(n.values()), n["C"] + n["P"]
    noise = n["R0"] + n["R1"] + n["U"]
    pairs = 0
    for i in "01":
        own = n["S" + i] + n["F" + i]
        pairs += own * (own + n["R" + i] + hubs)
        pairs += n["R" + i] * (own + (n["R" + i] + n["P"] if isolate else noise + hubs))
    if isolate:
        texts = n["S0"] + n["S1"] + n["F0"] + n["F1"]
        pairs += n["U"] * (n["U"] + n["P"]) + n["C"] * (texts + hubs) + n["P"] * total
    else:
        pairs += n["U"] * (noise + hubs) + hubs * total
    assert visibility.density() == pytest.approx(pairs / total**2, rel=1e-12)
    assert torch.equal(visibility.log_weight, visibility.log_weight.T)


def test_bench_reports_its_rows_and_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    result = benchmarks.bench_execute(tokens=600, repeats=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert result["suite"] == "execute"
    assert [row["case"] for row in result["rows"]] == list(benchmarks.CASES)
    for row in result["rows"]:
        assert row["max_err"] < 1e-5
        assert 0 < row["density"] < 1
        assert row["plan_bytes"] <= 8 * row["tokens"] * 3 + 17**2 * 8
        assert min(row["ours_s"], row["unmasked_s"], row["dense_s"]) > 0


def test_full_size_case_is_flux_with_four_references() -> None:
    visibility = benchmarks.CASES["four references, phase A"](8704)
    assert visibility.query_atom.numel() == 4096 + 4 * 1024 + 512
    assert visibility.density() < 0.35


def test_bench_error_is_the_distance_to_the_formula() -> None:
    visibility = random_visibility(40, 40, 4, 4, 0, soft=True, joint=True)
    q, k, v = inputs(40)
    expected = formula(visibility, q, k, v)
    wrong = expected.clone()
    wrong[0, 0, 39, 0] += 0.25
    assert benchmarks._error(expected, visibility, q, k, v) < 1e-12
    assert benchmarks._error(wrong, visibility, q, k, v) == pytest.approx(0.25, abs=1e-12)
