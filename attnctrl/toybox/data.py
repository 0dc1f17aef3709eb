"""Cached training data: renders encoded once, with the truth of every token; captions are drawn at each use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import world
from .vae import images_to_tensor

TOKEN_PIXELS = 8
REFERENCE_SIZE = 48
COLORS, SHAPES, PATTERNS = list(world.COLORS), list(world.SHAPES), list(world.PATTERNS)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] latents to FLUX's tokens [B, H/2 * W/2, 4C]."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The latents [B, C, H, W] of tokens [B, T, 4C] on `grid` (rows, columns)."""
    (rows, columns), channels = grid, tokens.shape[2] // 4
    cells = tokens.view(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(-1, channels, 2 * rows, 2 * columns)


def scene_to_json(scene: world.WorldScene) -> str:
    """One line of JSON."""
    return json.dumps(asdict(scene))


def scene_from_json(text: str) -> world.WorldScene:
    """The scene that `scene_to_json` wrote."""
    raw = json.loads(text)
    subjects = tuple(world.WorldSubject(**s) for s in raw["subjects"])
    return world.WorldScene(subjects, raw["background"], world.WorldStyle(**raw["style"]))


@dataclass
class Shard:
    """Scenes of one size and one number of subjects.

    `tokens` fp16 [N, T, 64]; `owner` int8 [N, T], index of the subject a token belongs to or -1; `reference` fp16
    [N, 36, 64], the picture of subject `shown[i]` alone.
    """

    height: int
    width: int
    scenes: list[world.WorldScene]
    tokens: Tensor
    owner: Tensor
    reference: Tensor
    shown: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // TOKEN_PIXELS, self.width // TOKEN_PIXELS


def token_owner(masks: np.ndarray, height: int, width: int) -> np.ndarray:
    """Subject that covers most of each token (at least a fifth), else -1. `masks` [N, H, W] -> int8 [T]."""
    n = len(masks)
    cells = masks.reshape(n, height // TOKEN_PIXELS, TOKEN_PIXELS, width // TOKEN_PIXELS, TOKEN_PIXELS).mean((2, 4))
    best = cells.argmax(0)
    return np.where(cells.max(0) >= 0.2, best, -1).astype(np.int8).reshape(-1)


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: list[np.ndarray]) -> Tensor:
    device = next(vae.parameters()).device
    latents = vae.encode(images_to_tensor(np.stack(images)).to(device)).latent_dist.mode()
    return pack(latents).half().cpu()


def make_shard(
    vae: AutoencoderKL, seed: int, subjects: int, count: int, height: int, width: int, tick: Callable[[int], None]
) -> Shard:
    """Sample, render and encode `count` scenes."""
    rng = np.random.default_rng(seed)
    scenes, tokens, owners, references, shown = [], [], [], [], []
    for start in range(0, count, 64):
        images, pictures = [], []
        for _ in range(min(64, count - start)):
            scene = world.sample_scene(rng, subjects, height, width)
            picture = world.render(scene, height, width)
            k = int(rng.integers(subjects))
            scenes.append(scene)
            images.append(picture.image)
            owners.append(token_owner(picture.masks, height, width))
            shown.append(k)
            alone = world.reference_scene(scene.subjects[k], rng)
            pictures.append(world.render(alone, REFERENCE_SIZE, REFERENCE_SIZE).image)
        tokens.append(_encode(vae, images))
        references.append(_encode(vae, pictures))
        tick(len(images))
    return Shard(
        height,
        width,
        scenes,
        torch.cat(tokens),
        torch.from_numpy(np.stack(owners)),
        torch.cat(references),
        torch.tensor(shown),
    )


def cached_shard(
    folder: Path,
    vae: AutoencoderKL,
    seed: int,
    subjects: int,
    count: int,
    height: int,
    width: int,
    tick: Callable[[int], None],
) -> Shard:
    """The shard from `folder` if it is there, else made and stored (whole or not at all)."""
    path = folder / f"{height}x{width}-{subjects}-{count}-{seed}.safetensors"
    if path.exists():
        data = load_file(path)
        scenes = [scene_from_json(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
        tick(count)
        return Shard(height, width, scenes, data["tokens"], data["owner"], data["reference"], data["shown"])
    shard = make_shard(vae, seed, subjects, count, height, width, tick)
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".jsonl").write_text("\n".join(map(scene_to_json, shard.scenes)) + "\n")
    temporary = path.with_suffix(".tmp")
    data = {"tokens": shard.tokens, "owner": shard.owner, "reference": shard.reference, "shown": shard.shown}
    save_file(data, temporary)
    temporary.replace(path)
    return shard


def truth(shard: Shard, picks: np.ndarray) -> dict[str, Tensor]:
    """What the auxiliary heads predict for each token of the picked scenes; class 0 means 'no subject here'."""
    owner = shard.owner[torch.from_numpy(picks)].long()
    table = np.zeros((len(picks), 5, 6), dtype=np.float32)
    for row, pick in enumerate(picks):
        for k, s in enumerate(shard.scenes[pick].subjects):
            table[row, k + 1] = (
                SHAPES.index(s.shape) + 1, COLORS.index(s.color) + 1, PATTERNS.index(s.pattern) + 1, s.x, s.y, s.radius,
            )  # fmt: skip
    values = torch.from_numpy(table).gather(1, (owner + 1)[..., None].expand(-1, -1, 6))
    h, w = shard.grid
    ys, xs = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    centre = torch.stack([xs, ys], -1).reshape(1, h * w, 2)
    present = (owner >= 0)[..., None]
    offset = torch.where(present, (values[..., 3:5] - centre) * 4, 0.0)
    return {
        "shape": values[..., 0].long(), "color": values[..., 1].long(), "pattern": values[..., 2].long(),
        "place": torch.cat([offset, values[..., 5:6] * 4], -1), "present": present.float(),
    }  # fmt: skip
