from __future__ import annotations

import numpy as np
import pytest

from attnctrl.metrics import auc, auc_metric, identity_similarity, set_consistency

EAST, NORTH, DIAGONAL = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])


def test_identity_similarity_is_the_cosine():
    assert identity_similarity(EAST, EAST) == 1
    assert identity_similarity(EAST, NORTH) == 0
    assert identity_similarity(EAST, -3 * EAST) == -1
    assert identity_similarity(EAST, DIAGONAL) == pytest.approx(2**-0.5)


def test_set_consistency_is_the_mean_over_pairs():
    assert set_consistency([EAST, EAST, EAST]) == 1
    # pairs: east-north 0, east-diagonal and north-diagonal 1 / sqrt 2
    assert set_consistency([EAST, NORTH, DIAGONAL]) == pytest.approx(2 * 2**-0.5 / 3)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"one length are compared; found \(2,\) and \(3,\)"):
        identity_similarity(EAST, np.ones(3))
    with pytest.raises(ValueError, match="zeros has no direction"):
        identity_similarity(EAST, np.zeros(2))
    with pytest.raises(ValueError, match="from two on; found 1"):
        set_consistency([EAST])


@pytest.mark.parametrize(
    ("same", "other", "want"),
    [
        ([0.9, 0.8], [0.1, 0.2], 1.0),
        ([0.1], [0.9], 0.0),
        ([0.5], [0.5], 0.5),
        # 0.9 beats all three; 0.4 beats 0.1, ties 0.4 and loses to 0.6: (3 + 1.5) of 6
        ([0.9, 0.4], [0.1, 0.4, 0.6], 4.5 / 6),
    ],
)
def test_auc_by_hand(same, other, want):
    assert auc(same, other) == pytest.approx(want)


def test_auc_needs_both_kinds():
    with pytest.raises(ValueError, match="found 0 and 1"):
        auc([], [0.5])
    with pytest.raises(ValueError, match="found 2 same and 1 different"):
        auc_metric([0.5, 0.6], [0.5])


def test_auc_entry_has_the_form_and_an_interval_of_anchors():
    sure = auc_metric([0.9, 0.8, 0.7], [0.1, 0.2, 0.3])
    assert sure == {"vanilla": 1.0, "controlled": None, "delta": None, "ci95": [1.0, 1.0], "better": "higher"}
    rng = np.random.default_rng(0)
    same, other = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    entry = auc_metric(same.tolist(), other.tolist())
    low, high = entry["ci95"]
    # Phi(1 / sqrt 2) = 0.76; the deviation of an AUC of 0.76 from 200 pairs is 0.024 (Hanley and McNeil 1982)
    assert entry["vanilla"] == pytest.approx(0.76, abs=0.05)
    assert low < entry["vanilla"] < high
    assert high - low == pytest.approx(2 * 1.96 * 0.024, rel=0.25)
    assert auc_metric(same.tolist(), other.tolist()) == entry
