"""Train a toy model from nothing: `python -m attnctrl.toybox.train toy-flux` (or toy-sd, toy-sd3).

Everything is resumable: the VAE, the encoded scenes and the flow's checkpoint lie in the work folder; running the
command again goes on from there, or from the exported weights where there is no checkpoint. `--samples` sets the length
of the schedule (constant rate, then a linear decay over its last share, `--decay`), so a finished run can be prolonged;
`--minutes` ends the schedule earlier. At its end the model is exported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from attnctrl.pipelines.runner import Runner

from . import world
from .data import Shard, cached_shard
from .export import export
from .flow import REFERENCE_SHARE, Flow, channel_weights, draw
from .models import RECIPES
from .vae import train as train_vae

MAIN_SIZE = (64, 64)
LATE_SIZES = [(64, 64), (80, 80), (64, 96), (96, 64)]
LATE_WEIGHTS = [0.4, 0.3, 0.15, 0.15]
LATE = 0.25
"""Share of the run, at its end, in which other canvas sizes join."""

GRID_PROMPTS = (
    "a red circle",
    "a blue square",
    "a yellow star",
    "a green heart, black background",
    "a striped purple triangle",
    "a large yellow cross",
    "a dotted red heart, white background",
    "a checked blue circle",
    "a red circle left, a blue square right",
    "a green star left, a red heart right",
    "a yellow triangle top, a purple cross bottom",
    "a red square, outlined style",
    "a red star left, a green circle center, a blue heart right",
    "a blue star, hatched style",
    "a purple circle, grainy style",
    "a red cross top left, a yellow circle top right, a green square bottom left, a blue star",
)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip


def rate_factor(done: int, share: float, decay: float = 0.25, warmup: int = 3200) -> float:
    """Learning-rate factor after `done` samples and `share` of the run: warm-up, constant, linear decay to zero.

    The decay takes the last share `decay` of the run.
    """
    return min(1.0, (done + 1) / warmup, max(0.0, (1 - share) / decay))


def load_or_train_vae(work: Path, exported: Path, steps: int, seed: int) -> AutoencoderKL:
    """The VAE of the work folder, else that of the exported pipeline, else a newly trained one."""
    folder = work / "vae"
    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder).eval()
    if (exported / "vae" / "config.json").exists():
        return AutoencoderKL.from_pretrained(exported / "vae", torch_dtype=torch.float32).eval()
    with _bar() as bar:
        task = bar.add_task("vae", total=steps, note="")
        vae = train_vae(
            steps, seed=seed, report=lambda step, d: bar.update(task, completed=step, note=f"{d['pixels']:.4f}")
        )
    vae.save_pretrained(folder)
    return vae


def load_shards(work: Path, vae: AutoencoderKL, size: tuple[int, int], scenes: int, seed: int) -> dict[int, Shard]:
    """One shard for each number of subjects; more scenes for the commoner numbers."""
    counts = {1: int(scenes * 0.36), 2: int(scenes * 0.36), 3: int(scenes * 0.16), 4: int(scenes * 0.12)}
    with _bar() as bar:
        task = bar.add_task(f"scenes {size[0]}x{size[1]}", total=sum(counts.values()), note="")
        tick = lambda n: bar.advance(task, n)  # noqa: E731
        return {n: cached_shard(work / "scenes", vae, seed + n, n, count, *size, tick) for n, count in counts.items()}


@contextmanager
def averaged(flow: Flow) -> Iterator[None]:
    """Averaged weights in evaluation mode, live ones afterwards."""
    flow.swap_average()
    flow.modules.eval()
    try:
        yield
    finally:
        flow.swap_average()
        flow.modules.train()


@torch.no_grad()
def sample_grid(flow: Flow, path: Path, seed: int = 1) -> None:
    """Sixteen fixed prompts with the averaged weights, four rows of four, whatever size the model has met."""
    with averaged(flow):
        images = Runner.of(flow.pipeline, flow.recipe.settings).draw(GRID_PROMPTS, [seed + i for i in range(16)])
    tiles = np.stack(images).reshape(4, 4, 64, 64, 3)
    grid = tiles.transpose(0, 2, 1, 3, 4).reshape(256, 256, 3)
    Image.fromarray(grid).resize((768, 768), Image.Resampling.NEAREST).save(path)


def save_checkpoint(flow: Flow, folder: Path, done: int, seconds: float, generator: torch.Generator) -> None:
    """Everything a resumed run needs, whole or not at all."""
    state = flow.state()
    state["generator"] = generator.get_state()
    temporary = folder / "checkpoint.tmp"
    save_file(state, temporary, metadata={"done": str(done), "seconds": f"{seconds:.1f}"})
    temporary.replace(folder / "checkpoint.safetensors")


def load_checkpoint(flow: Flow, folder: Path, generator: torch.Generator) -> tuple[int, float]:
    """Samples done and seconds spent so far; (0, 0) without a checkpoint."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        meta = file.metadata()
    state = load_file(path)
    generator.set_state(state.pop("generator"))
    flow.load_state(state)
    return int(meta["done"]), float(meta["seconds"])


def warm_start(flow: Flow, exported: Path) -> tuple[int, float]:
    """The weights of an exported pipeline, for want of a checkpoint; samples and seconds that went into them."""
    facts = exported / "attnctrl.json"
    if not facts.exists():
        return 0, 0.0
    past = json.loads(facts.read_text())["training"]
    for name, module in flow.modules.items():
        kind: Any = type(module)
        saved = kind.from_pretrained(exported / name, torch_dtype=torch.float32).state_dict()
        module.load_state_dict(saved)
    flow.average = {k: v.detach().clone() for k, v in flow.modules.state_dict().items()}
    return int(past["samples"]), float(past["seconds"])


def run(args: argparse.Namespace) -> Path:
    """Train (or go on) and export; returns the exported folder."""
    torch.manual_seed(args.seed)
    work = Path(args.work)
    folder = work / args.model
    folder.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[args.model]
    out = Path(args.out or Path("assets") / args.model)
    vae = load_or_train_vae(work, out, args.vae_steps, args.seed)
    shards = {MAIN_SIZE: load_shards(work, vae, MAIN_SIZE, args.scenes, args.seed)}
    pipeline = recipe.pipeline(vae)
    pipeline.set_progress_bar_config(disable=True)
    flow = Flow(recipe, pipeline, channel_weights(shards[MAIN_SIZE][1].tokens[:512]))
    generator = torch.Generator().manual_seed(args.seed)
    done, spent = load_checkpoint(flow, folder, generator)
    if not done and not args.fresh:
        done, spent = warm_start(flow, out)
    rng = np.random.default_rng([args.seed, done])
    references = REFERENCE_SHARE if recipe.references else 0.0
    flow.modules.train()
    began, last_grid, losses = time.monotonic(), time.monotonic(), []
    last_save = began
    with _bar() as bar, (folder / "log.jsonl").open("a") as log:
        task = bar.add_task(args.model, total=args.samples, completed=done, note="")
        while True:
            share = max(done / args.samples, (time.monotonic() - began) / (60 * args.minutes))
            if share >= 1:
                break
            late = args.mixed_sizes and share >= 1 - LATE
            if late and len(shards) == 1:
                for size in LATE_SIZES[1:]:
                    shards[size] = load_shards(work, vae, size, args.scenes // 8, args.seed)
            sizes, weights = (LATE_SIZES, LATE_WEIGHTS) if late else ([MAIN_SIZE], [1.0])
            batch = draw(shards, rng, args.batch, sizes, weights, references)
            losses.append(flow.step(batch, generator, rate_factor(done, share, args.decay)))
            done += args.batch
            seconds = spent + time.monotonic() - began
            if len(losses) == 50:
                record = {"done": done, "seconds": round(seconds, 1), "flow": round(float(np.mean(losses)), 5)}
                print(json.dumps(record), file=log, flush=True)
                bar.update(task, completed=done, note=f"flow {record['flow']:.4f}")
                losses.clear()
            if time.monotonic() - last_save > 60 * args.save_every:
                save_checkpoint(flow, folder, done, seconds, generator)
                last_save = time.monotonic()
            if time.monotonic() - last_grid > 60 * args.grid_every:
                sample_grid(flow, folder / f"grid-{done:07d}.png")
                last_grid = time.monotonic()
    seconds = spent + time.monotonic() - began
    save_checkpoint(flow, folder, done, seconds, generator)
    last = folder / f"grid-{done:07d}.png"
    sample_grid(flow, last)
    facts: dict[str, Any] = {"samples": done, "seconds": round(seconds), "world": len(world.WORDS)}
    with averaged(flow):
        export(pipeline, out, recipe.settings, facts)
    shutil.copy(last, out / "samples.png")
    return out


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m attnctrl.toybox.train", description=__doc__)
    p.add_argument("model", choices=sorted(RECIPES))
    p.add_argument("--samples", type=int, default=300_000, help="length of the schedule in samples")
    p.add_argument(
        "--minutes", type=float, default=float("inf"), help="length of the schedule in minutes, if that ends earlier"
    )
    p.add_argument("--decay", type=float, default=0.25, help="share of the run, at its end, in which the rate falls")
    p.add_argument("--mixed-sizes", action="store_true", help="other canvas sizes join in the last quarter")
    p.add_argument("--scenes", type=int, default=27_000, help="scenes rendered and encoded once")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--vae-steps", type=int, default=1700)
    p.add_argument(
        "--fresh", action="store_true", help="do not start from the exported model where there is no checkpoint"
    )
    p.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    p.add_argument("--grid-every", type=float, default=8, help="minutes between sample grids")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--work", default=".cache/toybox", help="folder for data, checkpoints and logs")
    p.add_argument("--out", help="folder of the exported pipeline (assets/MODEL)")
    return p


if __name__ == "__main__":
    sys.stdout.write(f"{run(parser().parse_args())}\n")
