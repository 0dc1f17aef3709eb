"""How classes are packed for kernels of variable length, and that each kernel is called as it wants to be.

The kernels themselves need a CUDA device or a package; here they are a reference of the same signature, which reads the
segments from the cumulative lengths alone.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from execute_tools import INF, formula, hard, inputs, random_visibility
from torch import Tensor

from attnctrl.errors import PlanError
from attnctrl.execute import Pass, plan, sdpa, varlen, xformers_block
from attnctrl.execute import bench as benchmarks
from attnctrl.execute.packed import PackedPlan, pack
from attnctrl.execute.terms import build_terms
from attnctrl.execute.varlen import FlashVarlen, TorchVarlen, VarlenPlan
from attnctrl.execute.xformers_block import XformersKernel, sequence_lengths
from attnctrl.visibility import Visibility

CHAIN = [[1, 0, 1], [0, 1, 0], [1, 1, 1]]


def segments_of(query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], scale: Any) -> list[Tensor]:
    """The reference: packs [n, H, D], [m, Hk, D] and int32 cumulative lengths to outputs and log-sum-exps."""
    assert starts[0].dtype == starts[1].dtype == torch.int32
    bounds = [one.tolist() for one in starts]
    assert (bounds[0][0], bounds[0][-1], bounds[1][0], bounds[1][-1]) == (0, len(query), 0, len(key))
    outputs, lses = [], []
    for segment in range(len(bounds[0]) - 1):
        q = query[bounds[0][segment] : bounds[0][segment + 1]].transpose(0, 1)
        k, v = (x[bounds[1][segment] : bounds[1][segment + 1]].transpose(0, 1) for x in (key, value))
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        lses.append(scores.logsumexp(-1))
    return [torch.cat(outputs), torch.cat(lses, 1)]


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """torch's, with the log-sum-exp as its kernel returns it: [H, n]."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    out, lse = segments_of(query, key, value, (cu_seq_q, cu_seq_k), scale)
    return (out, lse) if return_aux is not None and return_aux.lse else out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
) -> Tensor:
    return segments_of(q, k, v, (cu_seqlens_q, cu_seqlens_k), softmax_scale)[0]


class BlockDiagonalMask:
    def __init__(self, queries: list[int], keys: list[int]) -> None:
        self.starts = tuple(torch.tensor([0, *one], dtype=torch.int32).cumsum(0).int() for one in (queries, keys))

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int], kv_seqlen: list[int], *, device: torch.device) -> BlockDiagonalMask:
        return cls(q_seqlen, kv_seqlen)


def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any, scale: Any = None) -> Tensor:
    assert query.shape[0] == 1
    assert key.shape[2:4] == query.shape[2:4], "xformers does not broadcast heads"
    heads = [x[0].flatten(1, -2) for x in (query, key, value)]
    out = segments_of(heads[0], heads[1], heads[2], attn_bias.starts, scale)[0]
    return out.view(*query.shape[:-1], value.shape[-1])


@pytest.fixture
def torch_varlen(monkeypatch: pytest.MonkeyPatch) -> TorchVarlen:
    kernel = TorchVarlen()
    kernel._module = SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=kernel._module.AuxRequest)  # type: ignore[assignment]
    monkeypatch.setattr(varlen, "_flash_serves", lambda query, value: True)
    return kernel


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, with the parts that are used."""
    parts = {name: ModuleType(name) for name in ("xformers", "xformers.ops", "xformers.ops.fmha.attn_bias")}
    parts["xformers"].__spec__ = SimpleNamespace(name="xformers")  # type: ignore[assignment]
    parts["xformers.ops"].memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    parts["xformers.ops.fmha.attn_bias"].BlockDiagonalMask = BlockDiagonalMask  # type: ignore[attr-defined]
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    xformers_block.find_fault.cache_clear()
    yield
    xformers_block.find_fault.cache_clear()


# --- packing -------------------------------------------------------------------------------------------------------


def test_classes_are_packed_one_after_the_other() -> None:
    packing = pack(build_terms([Pass(hard([0, 1, 2, 0, 1, 2, 0], CHAIN))]))
    assert packing.queries.tolist() == [0, 3, 6, 1, 4, 2, 5]
    assert packing.lengths == ((3, 5), (2, 2), (2, 7))
    assert packing.sizes == (7, 14)
    assert packing.longest == (3, 7)
    assert packing.query_starts.tolist() == [0, 3, 5, 7]
    assert packing.key_starts.tolist() == [0, 5, 7, 14]
    tokens = torch.arange(7.0)[None, None, :, None]
    keys, values = packing.pack_keys(tokens, tokens + 10)
    seen = [set(part.flatten().int().tolist()) for part in keys.split([5, 2, 7], 1)]
    assert seen == [{0, 2, 3, 5, 6}, {1, 4}, {0, 1, 2, 3, 4, 5, 6}]
    assert torch.equal(values, keys + 10)
    assert torch.equal(packing.unpack(packing.pack_queries(tokens), None, 7), tokens)


def test_batch_entries_follow_each_other() -> None:
    packing = pack(build_terms([Pass(hard([0, 1, 2, 0, 1, 2, 0], CHAIN))]))
    queries, keys = packing.starts(3)
    assert queries.tolist() == [0, 3, 5, 7, 10, 12, 14, 17, 19, 21]
    assert keys.tolist() == [0, 5, 7, 14, 19, 21, 28, 33, 35, 42]
    assert sequence_lengths(packing, 2) == ([3, 2, 2, 3, 2, 2], [5, 2, 7, 5, 2, 7])


def test_soft_classes_are_one_segment_per_log_weight() -> None:
    table = torch.tensor([[0, 1.0, 0], [-INF, 0, 0], [0.5, 1.0, 2.0]])
    packing = pack(build_terms([Pass(Visibility.joint(torch.tensor([0, 0, 1, 2, 2, 2]), table, "abc"))]))
    assert packing.lengths == ((2, 5), (2, 1), (1, 4), (3, 2), (3, 1), (3, 3))
    assert packing.log_weight is not None
    assert packing.log_weight.tolist() == [0, 1, 0, 0.5, 1, 2]
    assert packing.queries.tolist() == [0, 1, 2, 3, 4, 5], "queries are held once"
    tokens = torch.arange(6.0)[None, None, :, None]
    assert packing.pack_queries(tokens).flatten().tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]


@pytest.mark.parametrize("tokens", [1000, 8000])
def test_packing_grows_with_tokens_only(tokens: int) -> None:
    """Keys are copied several times when it runs, and held once. The grouped calls behind it need as much again."""
    visibility = benchmarks.lamic(tokens, [(0, 0, 0.6, 0.6), (0.3, 0.3, 1, 1)], isolate_regions=False)
    count, groups = visibility.query_atom.numel(), len(visibility.query_names)
    packing = pack(build_terms([Pass(visibility)]))
    assert packing.sizes[1] > 2 * count
    assert packing.nbytes <= 8 * count * 2 + 16 * groups**2
    assert plan(visibility, executor="varlen").nbytes <= 8 * count * 5 + 24 * groups**2


# --- kernels -------------------------------------------------------------------------------------------------------


def run_with(kernel: Any, passes: Any, tensors: list[Tensor], **extra: Any) -> Tensor:
    made = VarlenPlan(build_terms(passes), "tested")
    made._packed_kernel = kernel
    return made.run(*tensors, kernel=refuse, **extra)


def refuse(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the packed kernel was not used")


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_torch_varlen_gets_its_arguments(torch_varlen: TorchVarlen, soft: bool, batch: int, key_heads: int) -> None:
    visibility = random_visibility(40, 40, 5, 5, 4, soft=soft, joint=True)
    passes = [Pass(visibility, torch.full((5,), 0.5)), Pass(Visibility.open(40), torch.tensor([0.5]))]
    q, k, v = inputs(40, batch=batch, heads=4)
    k, v = k[:, :key_heads], v[:, :key_heads]
    whole = [x.repeat_interleave(4 // key_heads, 1) for x in (k, v)]
    out = run_with(torch_varlen, passes, [q, k, v], scale=0.4)
    assert (out - formula(passes, q, *whole, scale=0.4)).abs().max() < 1e-12


def test_flash_attn_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_flash_serves", lambda query, value: True)
    visibility = random_visibility(40, 40, 5, 5, 4, soft=False, joint=True)
    q, k, v = inputs(40, batch=2)
    out = run_with(FlashVarlen(flash_attn_varlen_func), [Pass(visibility)], [q, k, v], scale=0.4)
    assert (out - formula(visibility, q, k, v, scale=0.4)).abs().max() < 1e-12


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_xformers_gets_its_arguments(xformers: None, monkeypatch: pytest.MonkeyPatch, key_heads: int) -> None:
    monkeypatch.setattr(XformersKernel, "serves", lambda *_: True)
    visibility = random_visibility(40, 40, 5, 5, 4, soft=False, joint=True)
    q, k, v = inputs(40, batch=3, heads=4)
    k, v = k[:, :key_heads], v[:, :key_heads, :, :6]
    made = plan(visibility, executor="xformers")
    out = made.run(q, k, v, kernel=refuse, scale=0.4)
    whole = [x.repeat_interleave(4 // key_heads, 1) for x in (k, v)]
    scores = q @ whole[0].mT * 0.4 + visibility.dense(torch.float64)
    assert (out - scores.softmax(-1) @ whole[1]).abs().max() < 1e-12
    assert "one block-diagonal call of xformers" in made.explain()


def test_kernels_take_what_flash_takes() -> None:
    x = torch.zeros(1, 2, 4, 64, dtype=torch.bfloat16)
    kernel = TorchVarlen()
    assert kernel.serves(x, x, x)
    for other in (x.float(), x[..., :60], torch.zeros(1, 2, 4, 264, dtype=torch.bfloat16)):
        assert not kernel.serves(other, other, other)
    assert not kernel.serves(x, x, x[..., :32])


def test_what_a_kernel_does_not_serve_goes_through_grouped_calls() -> None:
    visibility = hard([0] * 20 + [1] * 20, [[1, 0], [1, 1]])
    made = VarlenPlan(build_terms([Pass(visibility)]), "tested")
    made._packed_kernel = TorchVarlen()
    q, k, v = inputs(40)
    assert (made.run(q, k, v, kernel=sdpa) - formula(visibility, q, k, v)).abs().max() < 1e-12


def test_a_device_without_a_kernel_runs_segment_by_segment_and_says_so() -> None:
    made = plan(hard([0, 1], [[1, 0], [0, 1]]), executor="varlen")
    assert isinstance(made, PackedPlan)
    assert made.explain().endswith("asked for; cpu has no kernel of variable length: segment by segment")


# --- xformers ------------------------------------------------------------------------------------------------------


def test_xformers_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers_block.find_fault.cache_clear()
    monkeypatch.setattr(xformers_block, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=r"asked for on cpu, but xformers is not installed.*attnctrl\[xformers\]"):
        plan(hard([0, 1], [[1, 0], [0, 1]]), executor="xformers")
    xformers_block.find_fault.cache_clear()


def test_xformers_that_fails_at_its_first_call_is_named(xformers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError("No operator found\nwith a long story")

    monkeypatch.setattr(sys.modules["xformers.ops"], "memory_efficient_attention", broken)
    with pytest.raises(PlanError, match=r"a tiny call of xformers fails there: No operator found\. Use"):
        plan(hard([0, 1], [[1, 0], [0, 1]]), executor="xformers")


def test_xformers_that_cannot_be_imported_is_named(xformers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(PlanError, match="xformers cannot be imported"):
        plan(hard([0, 1], [[1, 0], [0, 1]]), executor="xformers")


def test_xformers_refuses_soft_rows(xformers: None) -> None:
    soft = Visibility.joint(torch.tensor([0, 1]), torch.tensor([[0, 1.0], [0, 0]]), "ab")
    with pytest.raises(PlanError, match=r"several log-weights.*'auto', 'grouped', 'varlen' or 'flex'"):
        plan(soft, executor="xformers")
