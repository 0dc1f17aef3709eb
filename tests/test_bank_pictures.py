"""Real pictures in banks, and the page about banks, executed as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnctrl.pipelines.bank import keep_pictures
from attnctrl.pipelines.inversion import InversionSettings, Inverter
from bank_tools import PIPES, PROMPTS, STEPS, run
from PIL import Image

import attnctrl as ac
from attnctrl.inversion import diffusion_shares, flow_shares, noised, odds_map

PAGE = Path(__file__).parents[1] / "docs" / "bank.md"
SETTINGS = InversionSettings(prompt=PROMPTS[0], negative_prompt="a blue square", steps=STEPS, guidance=3.0, seed=5)


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", PIPES)
def test_a_real_picture_is_read_as_if_its_noised_latents_were_a_row_of_the_batch(name: str) -> None:
    pipe = PIPES[name]()
    inverter, bank, scheduler = Inverter.from_pipe(pipe, name), ac.Bank(), pipe.scheduler
    keep_pictures(inverter, picture(), ac.Keep(bank=bank), SETTINGS)
    assert pipe.scheduler is scheduler
    assert (bank.pictures, bank.steps, bank.branches) == (1, (0, 1, 2), ("cond", "uncond"))
    clean = inverter.encode(picture())
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    shares = (
        flow_shares(bank.sigmas) if inverter.adapter.flow else diffusion_shares(1 / (1 + s * s) for s in bank.sigmas)
    )
    path = noised(clean, noise, shares)

    def overwrite(_pipe: Any, step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        latents = given["latents"].clone()
        latents[:1] = path[min(step + 1, STEPS - 1)]
        return {"latents": latents}

    start = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    anchors = ac.Share(readers="anchors", anchors=1)
    both = torch.cat([path[0], start])
    joint = run(pipe, range(2), anchors, latents=both, callback_on_step_end=overwrite)
    read = run(pipe, range(1, 2), ac.Share(bank=bank), latents=start)
    torch.testing.assert_close(read, joint[1:], rtol=0, atol=1e-4)
    assert (read - run(pipe, range(1, 2), latents=start)).abs().max() > 2e-3


def test_only_steps_that_are_kept_are_run_and_cleaner_pictures_are_others() -> None:
    pipe = PIPES["flux"]()
    inverter, told = Inverter.from_pipe(pipe, "flux"), []
    plain, clear = ac.Bank(), ac.Bank()
    keep = {"window": (0.3, 1.0), "every": 2, "branch": "cond"}
    keep_pictures(
        inverter, picture(), ac.Keep(bank=plain, **keep), SETTINGS, progress=lambda done, of: told.append((done, of))
    )
    assert (told, plain.steps) == ([(1, 1)], (2,))
    keep_pictures(inverter, picture(), ac.Keep(bank=clear, **keep), SETTINGS, cleaner=odds_map(0.5))
    moved = [(plain.entries[e].states - clear.entries[e].states).abs().max() for e in plain.entries]
    assert min(moved) > 0


def test_the_page_of_banks_runs_and_its_table_is_what_is_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, names)
    assert names["keep"].bank.nbytes == names["bank"].nbytes
    assert (names["bank"].pictures, names["real"].pictures) == (1, 1)
    assert len(names["images"]) == 2
    assert [line for line in page.splitlines() if line.startswith(("| keys", "| inputs"))] == names["table"]
