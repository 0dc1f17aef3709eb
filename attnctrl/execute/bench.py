"""Speed and exactness of the planner's choice against the unmasked kernel and against a dense mask, on one attention
call.

    python -m attnctrl.execute.bench                    # the table; --tokens, --repeats, --threads, --json
    python -m attnctrl.execute.bench --thresholds       # the numbers behind the planner's constants

All timings of a case are taken in one interleaved loop and reported as medians, so other load on the machine hits all
of them alike. The dense opponent is the faster of an additive and a boolean mask, both made beforehand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..visibility import Visibility
from .base import sdpa
from .planner import plan

HEADS, HEAD_DIM = 4, 64
SEES, BLOCKED = 0.0, float("-inf")


def bench_execute(
    tokens: int = 8704, repeats: int = 3, cases: Sequence[str] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Time the automatic plan of each case.

    Args:
        tokens: of four references in four quadrants (8704 is 1024 x 1024 px with 512 x 512 references), and
            the measure of all other cases.
        repeats: rounds of the interleaved loop, after one round to warm up.
        cases: names out of `CASES`; None means all.
        seed: of the inputs; the global generator is not touched.

    Returns:
        {"suite": "execute", "rows": [...]}; a row holds case, tokens, density (of the mask), ours_s, unmasked_s,
        dense_s (seconds, medians), plan_bytes and max_err: the largest deviation from the dense formula in float64 on
        up to 512 spread query tokens.
    """
    rows = [_row(name, CASES[name](tokens), repeats, seed) for name in (cases or CASES)]
    return {"suite": "execute", "rows": rows}


def lamic(
    tokens: int, boxes: Sequence[tuple[float, float, float, float]], *, isolate_regions: bool, large: bool = False
) -> Visibility:
    """LAMIC's visibility for one text, one region and one reference per box; phase A isolates regions from each
    other, B does not.

    Sequence [S_1..S_N, scene sentence, padding | noise | F_1..F_N], sizes in FLUX's proportions: of 8704 tokens with
    four references, 4096 are noise and 1024 each reference; `large` references have 4096 as well.
    """
    side = max(4, round((tokens * 4096 / 8704) ** 0.5 / 2) * 2)
    reference = side**2 if large else (side // 2) ** 2
    text = max(8 * (len(boxes) + 2), side * side // 8)
    segment = text // 20
    names = [kind + str(i) for kind in "SRF" for i in range(len(boxes))] + ["C", "P", "U"]
    atom_of = {name: number for number, name in enumerate(names)}
    noise = torch.full((side, side), atom_of["U"])
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        noise[round(y0 * side) : round(y1 * side), round(x0 * side) : round(x1 * side)] = atom_of[f"R{i}"]
    texts = [torch.full((segment,), atom_of[f"S{i}"]) for i in range(len(boxes))]
    pads = text - segment * (len(boxes) + 2)
    hubs = [torch.full((2 * segment,), atom_of["C"]), torch.full((pads,), atom_of["P"])]
    references = [torch.full((reference,), atom_of[f"F{i}"]) for i in range(len(boxes))]
    table = torch.full((len(names), len(names)), BLOCKED)
    for q, asks in enumerate(names):
        for k, answers in enumerate(names):
            if _lamic_sees(asks, answers, isolate_regions):
                table[q, k] = SEES
    return Visibility.joint(torch.cat([*texts, *hubs, noise.flatten(), *references]), table, names)


def _lamic_sees(query: str, key: str, isolate_regions: bool) -> bool:
    """The rule of lamic.md section 3 for disjoint regions, atoms named by group and entity ("R2")."""
    kinds = query[0] + key[0]
    if "P" in kinds:
        return True
    if set(kinds) <= {"C", "S", "F"} and "C" in kinds:
        return True
    if set(kinds) <= {"R", "U", "C"}:
        same = query == key
        return same or not isolate_regions
    return "U" not in kinds and query[1:] == key[1:]


def regional_text(tokens: int) -> Visibility:
    """Prompts for two halves (Seg2Any's SAA): image tokens see each other, the global text and their region's."""
    side = max(4, round((tokens * 4096 / 8704) ** 0.5 / 2) * 2)
    text = max(4, side * side // 32)
    noise = torch.full((side, side), 3)
    noise[:, side // 2 :] = 4
    atom = torch.cat([torch.arange(3).repeat_interleave(text), noise.flatten()])
    sees = torch.tensor([[1, 0, 0, 1, 1], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1], [1, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    table = torch.where(sees > 0, SEES, BLOCKED)
    return Visibility.joint(atom, table, ("global text", "text 1", "text 2", "left", "right"))


_QUADRANTS = [(0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5), (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0)]
_HALVES = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
_BOXES = [(0.05, 0.3, 0.45, 0.95), (0.55, 0.3, 0.95, 0.95)]

CASES: dict[str, Callable[[int], Visibility]] = {
    "four references, phase A": lambda tokens: lamic(tokens, _QUADRANTS, isolate_regions=True),
    "four references, phase B": lambda tokens: lamic(tokens, _QUADRANTS, isolate_regions=False),
    "two halves, phase A": lambda tokens: lamic(tokens, _HALVES, isolate_regions=True),
    "two halves, phase B": lambda tokens: lamic(tokens, _HALVES, isolate_regions=False),
    "two boxes and free area, phase A": lambda tokens: lamic(tokens, _BOXES, isolate_regions=True),
    "two boxes and free area, phase B": lambda tokens: lamic(tokens, _BOXES, isolate_regions=False),
    # at half the size, as they would have 20992 tokens
    "four large references, phase A": lambda tokens: lamic(tokens // 2, _QUADRANTS, isolate_regions=True, large=True),
    "four large references, phase B": lambda tokens: lamic(tokens // 2, _QUADRANTS, isolate_regions=False, large=True),
    "regional text": regional_text,
}


def _row(name: str, visibility: Visibility, repeats: int, seed: int) -> dict[str, Any]:
    tokens = visibility.query_atom.numel()
    query, key, value = random_inputs(tokens, seed)
    chosen = plan(visibility)
    bias, sees = visibility.dense(), visibility.dense().isfinite()
    seconds = interleaved(
        {
            "ours": lambda: chosen.run(query, key, value, kernel=sdpa),
            "unmasked": lambda: sdpa(query, key, value),
            "bias": lambda: sdpa(query, key, value, mask=bias),
            "bool": lambda: sdpa(query, key, value, mask=sees),
        },
        repeats,
    )
    out = chosen.run(query, key, value, kernel=sdpa)
    return {
        "case": name,
        "executor": chosen.executor,
        "tokens": tokens,
        "density": visibility.density(),
        "ours_s": seconds["ours"],
        "unmasked_s": seconds["unmasked"],
        "dense_s": min(seconds["bias"], seconds["bool"]),
        "plan_bytes": chosen.nbytes,
        "max_err": _error(out, visibility, query, key, value),
    }


def random_inputs(
    tokens: int, seed: int = 0, heads: int = HEADS, head_dim: int = HEAD_DIM
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v float32 [1, H, T, D] as views of [1, T, H, D] memory, the way Diffusers' projections leave them."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, tokens, heads, head_dim, generator=generator).transpose(1, 2) for _ in range(3)]
    return made[0], made[1], made[2]


def interleaved(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, see `rounds`."""
    return {name: median(taken) for name, taken in rounds(calls, repeats).items()}


def rounds(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, all of them timed in turn, `repeats` rounds after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def _error(out: Tensor, visibility: Visibility, query: Tensor, key: Tensor, value: Tensor) -> float:
    """Largest deviation from the dense formula in float64, on query tokens spread over the sequence."""
    tokens = torch.linspace(0, query.shape[2] - 1, min(512, query.shape[2])).long()
    bias = visibility.log_weight.double()[visibility.query_atom[tokens]][:, visibility.key_atom]
    scores = query[:, :, tokens].double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
    return float((scores.softmax(-1) @ value.double() - out[:, :, tokens]).abs().max())


def thresholds(repeats: int = 7) -> list[dict[str, float]]:
    """Grouped against dense where the planner has to choose: few tokens, and classes that see themselves and a hub."""
    rows = []
    for tokens in (128, 256, 512, 1024):
        for classes in (2, 4, 8, 16):
            atom = torch.arange(tokens) * (classes + 1) // tokens
            table = torch.full((classes + 1, classes + 1), BLOCKED).fill_diagonal_(SEES)
            table[:, 0] = table[0] = SEES
            visibility = Visibility.joint(atom, table, [str(number) for number in range(classes + 1)])
            inputs = random_inputs(tokens)
            plans = {name: plan(visibility, executor=name) for name in ("grouped", "dense", "auto")}
            calls = {name: partial(made.run, *inputs, kernel=sdpa) for name, made in plans.items()}
            seconds = interleaved(calls, repeats)
            rows.append(
                {"tokens": tokens, "classes": classes + 1, "density": visibility.density()}
                | {f"{name}_ms": 1e3 * taken for name, taken in seconds.items()}
            )
    return rows


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8704)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--thresholds", action="store_true")
    asked = parser.parse_args()
    if asked.threads:
        torch.set_num_threads(asked.threads)
    if asked.thresholds:
        lines = ["  ".join(f"{name} {value:.3g}" for name, value in found.items()) for found in thresholds()]
    else:
        result = bench_execute(tokens=asked.tokens, repeats=asked.repeats)
        lines = [json.dumps(result, indent=2)] if asked.json else _table(result["rows"])
    sys.stdout.write("\n".join(lines) + "\n")


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [f"{'case':34} tokens density  ours/dense  ours/unmasked  ours s  plan kB  max err"]
    for row in rows:
        ratios = f"{row['ours_s'] / row['dense_s']:10.2f}  {row['ours_s'] / row['unmasked_s']:13.2f}"
        sizes = f"{row['ours_s']:6.3f} {row['plan_bytes'] / 1e3:8.0f}  {row['max_err']:.1e}"
        lines.append(f"{row['case']:34} {row['tokens']:6} {row['density']:7.2f}  {ratios}  {sizes}")
    return lines


if __name__ == "__main__":
    main()
