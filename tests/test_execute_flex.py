"""Block masks come from atoms and tables alone, and strengths change without a new kernel."""

from __future__ import annotations

import pytest
import torch
from execute_tools import INF, LargestTensor, formula, hard, inputs, random_visibility
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from attnctrl.execute import Pass, plan, sdpa
from attnctrl.execute import bench as benchmarks
from attnctrl.execute.flex import FlexPlan, block_pairs, make_block_mask, occupancy
from attnctrl.execute.terms import build_terms
from attnctrl.visibility import Visibility

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@settings(max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    groups=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 2**16),
    block=st.integers(1, 16),
)
def test_occupancy_is_that_of_the_mask(sizes: tuple[int, int], groups: tuple[int, int], seed: int, block: int) -> None:
    visibility = random_visibility(*sizes, *groups, seed, soft=False, joint=False)
    found = occupancy(visibility.log_weight, visibility.query_atom, visibility.key_atom, block)
    sees = visibility.dense().isfinite()
    padded = torch.nn.functional.pad(sees, (0, -sizes[1] % block, 0, -sizes[0] % block))
    tiles = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(found.some, tiles.any(-1))
    assert torch.equal(found.full, tiles.all(-1))


@pytest.mark.parametrize("tokens", [256, 300])
def test_block_mask_is_torchs_own(tokens: int) -> None:
    """Whole blocks of one atom, and a last block that is cut off."""
    visibility = hard((torch.arange(tokens) // 64).clamp(max=3).tolist(), [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])  # fmt: skip
    table = (visibility.log_weight, visibility.query_atom, visibility.key_atom)
    ours = make_block_mask(*table)
    dense = visibility.dense().isfinite()
    theirs = create_block_mask(lambda b, h, i, j: dense[i, j], 1, 1, tokens, tokens, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for kind in ("kv", "full_kv"):
        counts = getattr(ours, f"{kind}_num_blocks")
        for row in range(counts.shape[-1]):
            some = slice(0, int(counts[0, 0, row]))
            assert torch.equal(*(getattr(one, f"{kind}_indices")[0, 0, row, some] for one in (ours, theirs)))
    assert ours.full_kv_num_blocks.sum() > 0


def test_tokens_are_ordered_so_that_blocks_are_empty_or_full() -> None:
    """lamic.md section 6: two halves fill .95 of the blocks in raster order, where every block meets both."""
    visibility = benchmarks.CASES["two halves, phase A"](8704)
    terms = build_terms([Pass(visibility)])
    blocks = occupancy(visibility.log_weight, visibility.query_atom, visibility.key_atom)
    assert terms.density * terms.tokens[0] ** 2 < block_pairs(terms) < 0.65 * blocks.pairs


def test_planning_makes_nothing_of_tokens_times_tokens() -> None:
    visibility = benchmarks.lamic(2200, [(0.1, 0.1, 0.5, 0.9), (0.5, 0.1, 0.9, 0.9)], isolate_regions=True)
    tokens = visibility.query_atom.numel()
    with LargestTensor() as seen:
        made = plan(visibility, executor="flex")
    assert seen.numel <= 16 * tokens < tokens**2 / 80
    blocks = -((-tokens // 128) ** 2)
    assert made.nbytes <= 8 * tokens * 7 + 32 * blocks + 8 * 17**2


def test_block_masks_are_made_with_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = random_visibility(60, 60, 4, 4, 7, soft=False, joint=True)
    made = plan(visibility, executor="flex")
    monkeypatch.setattr("attnctrl.execute.flex.make_block_mask", None)
    q, k, v = inputs(60)
    for _ in range(2):
        assert (made.run(q, k, v, kernel=sdpa) - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_new_strengths_need_no_new_graph() -> None:
    """The plan is an argument here, as it hangs on a module there."""
    torch._dynamo.reset()
    compiled: list[int] = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        compiled.append(len(graph.graph.nodes))
        return graph

    @torch.compile(backend=count, fullgraph=True)
    def run(made: FlexPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return made.run(q, k, v, kernel=sdpa)

    q, k, v = inputs(60, batch=1)
    atom = torch.arange(60) // 20
    for strength in (-0.5, -1.0, -2.0, 1.5):
        table = torch.tensor([[0, strength, -INF], [strength, 0, 0], [-INF, 0.25, 0]])
        visibility = Visibility.joint(atom, table, "abc")
        made = plan(visibility, executor="flex")
        assert isinstance(made, FlexPlan)
        assert (run(made, q, k, v) - formula(visibility, q, k, v)).abs().max() < 1e-12
    assert len(compiled) == 1


def test_explain_counts_blocks() -> None:
    """Two blocks of queries: the first sees the first two of three blocks of keys, the second all, the last in part."""
    atom, keys = torch.arange(256) // 128, (torch.arange(384) // 100).clamp(max=3)
    table = torch.tensor([[0, 0, 0, -INF], [0, 0, 0, 0]])
    made = plan(Visibility(atom, keys, table, ("a", "b"), tuple("wxyz")), executor="flex")
    assert made.explain().endswith("asked for; 1.00 of the 128 x 128 blocks, 0.17 partial")
