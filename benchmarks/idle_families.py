"""What idle controls cost each family: `python benchmarks/idle_families.py` prints JSON.

The models are the tests' tiny random ones, whose forwards take a few milliseconds: the difference in time is what a
forward of any size pays, and the ratio is far above that of a real one.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "battery")]

from harness import FAMILIES  # noqa: E402

import attnctrl as ac  # noqa: E402
from attnctrl.execute.bench import interleaved  # noqa: E402


def row(name: str, repeats: int = 101) -> dict[str, object]:
    """One family: whether outputs are bit-equal, and medians of an interleaved run."""
    setting = FAMILIES[name]()
    plain = copy.copy(setting)
    plain.model = copy.deepcopy(setting.model)
    with ac.attach(setting.model, [ac.Isolate(strength=0.0), ac.Regions([])]), torch.inference_mode():
        equal = torch.equal(setting.run(), plain.run())
        seconds = interleaved({"vanilla": plain.run, "idle": setting.run}, repeats)
    more = seconds["idle"] - seconds["vanilla"]
    return {
        "family": name,
        "bit_equal": equal,
        "vanilla_ms": 1e3 * seconds["vanilla"],
        "more_us": 1e6 * more,
        "ratio": seconds["idle"] / seconds["vanilla"],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = [row(name) for name in FAMILIES]
    sys.stdout.write(json.dumps({"suite": "idle families", "rows": rows}, indent=2) + "\n")
