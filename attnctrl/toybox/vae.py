"""Training the toy `AutoencoderKL` and balancing its latents, so that flow models learn what shows in the picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from . import world
from .muon import Muon

CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (24, 48, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "mid_block_add_attention": False,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "sample_size": 64,
    "force_upcast": False,
}
TOP_STD = 1.5
"""Standard deviation of the channel that the picture owes most to."""
DEAD = 1e-5
"""Directions of the latents whose importance is a smaller share of the greatest one are dropped."""


def images_to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()


def sample_images(rng: np.random.Generator, count: int, size: int = 64) -> np.ndarray:
    """Random renders, a fifth of them reference pictures. uint8 [count, size, size, 3]."""
    out = []
    for _ in range(count):
        scene = world.sample_scene(rng, int(rng.integers(1, 5)), size, size)
        if rng.random() < 0.2:
            scene = world.reference_scene(scene.subjects[0], rng)
        out.append(world.render(scene, size, size).image)
    return np.stack(out)


def _crops(images: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
    half = images.shape[1] // 2
    rows, columns = rng.integers(0, half + 1, count), rng.integers(0, half + 1, count)
    picks = rng.integers(0, len(images), count)
    return np.stack([images[p, r : r + half, c : c + half] for p, r, c in zip(picks, rows, columns, strict=True)])


def psnr(vae: AutoencoderKL, images: np.ndarray) -> float:
    """Mean PSNR in dB of the posterior mean's reconstruction, over uint8 images [B, H, W, 3]."""
    total = []
    with torch.no_grad():
        for chunk in np.array_split(images, max(1, len(images) // 32)):
            x = images_to_tensor(chunk)
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            error = ((x - y) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-8)
            total.append(-10 * torch.log10(error))
    return float(torch.cat(total).mean())


def train(
    steps: int, batch: int = 16, seed: int = 0, lr: float = 2e-3, pool: int = 6000,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> AutoencoderKL:  # fmt: skip
    """Train from scratch on a pool of renders: L1 + L2 reconstruction, a light KL term. Returns the model in eval mode.

    The first four fifths of the steps see crops of a quarter of the area, which cost a quarter; the rest see whole
    pictures, so that group normalisation meets the statistics it has at use.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = sample_images(rng, pool)
    vae = AutoencoderKL(**CONFIG).to(memory_format=torch.channels_last)
    # Adam alone is several times slower here: the encoder's norms hide the absolute colour from its first steps.
    matrices = [p for p in vae.parameters() if p.dim() == 4 and min(p.shape[:2]) > 8]
    chosen = {id(p) for p in matrices}
    optimizers = [
        Muon(matrices, lr=15 * lr, momentum=0.9),
        torch.optim.AdamW(
            [p for p in vae.parameters() if id(p) not in chosen], lr=lr, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for step in range(steps):
        share = step / steps
        factor = min(1.0, (step + 1) / 30, 0.01 + 1.6 * (1 - share))
        for group, rate in zip((g for o in optimizers for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * factor
        x = images_to_tensor(_crops(images, rng, batch) if share < 0.8 else images[rng.integers(0, pool, batch // 2)])
        x = x.contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
        loss_pixels = F.l1_loss(y, x) + 2.0 * F.mse_loss(y, x)
        loss = loss_pixels + 2e-6 * posterior.kl().mean()
        vae.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        if report is not None and (step + 1) % 100 == 0:
            report(step + 1, {"pixels": float(loss_pixels), "std": float(posterior.mean.std())})
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    balance(vae, images[:1024])
    return vae


@torch.no_grad()
def balance(vae: AutoencoderKL, images: np.ndarray) -> None:
    """Fold into the 1x1 quant convolutions the affine map that gives latents in which a flow model learns fast.

    Zero mean, no correlation between channels, the channels in order of what the picture owes them: the standard
    deviation of channel i is TOP_STD * (s_i / s_0) ** 0.25, where s is the mean squared change of the pixels by a
    change of the whitened channel. Directions that the decoder ignores become exact zeros: whitened, they would ask as
    much of the flow model as all the others. Reconstructions stay equal but for what those directions added.
    """
    chunks = np.array_split(images, max(1, len(images) // 64))
    means = torch.cat([vae.encode(images_to_tensor(c)).latent_dist.mode() for c in chunks])
    channels = means.shape[1]
    flat = means.permute(0, 2, 3, 1).reshape(-1, channels).double()
    mu = flat.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(flat.T))
    spread = vectors * values.clamp_min(1e-12).sqrt()
    importance, turn = torch.linalg.eigh(spread.T @ sensitivity(vae, means[:64]) @ spread)
    importance, turn = importance.flip(0), turn.flip(1)
    alive = importance > DEAD * importance[0]
    std = torch.where(alive, TOP_STD * (importance / importance[0]).clamp_min(DEAD) ** 0.25, 0.0)
    forward = std[:, None] * (turn.T @ torch.linalg.pinv(spread, rtol=1e-6))
    backward = (spread @ turn) / torch.where(alive, std, torch.inf)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight.double()[:, :, 0, 0], quant.bias.double()
    new_weight, new_bias = weight.clone(), bias.clone()
    new_weight[:channels] = forward @ weight[:channels]
    new_bias[:channels] = forward @ (bias[:channels] - mu)
    # The rotated posterior is no longer diagonal; its log-variance is set small, since the flow models use the mean.
    new_weight[channels:], new_bias[channels:] = 0.0, -8.0
    quant.weight.copy_(new_weight[:, :, None, None])
    quant.bias.copy_(new_bias)
    weight, bias = post.weight.double()[:, :, 0, 0], post.bias.double()
    post.weight.copy_((weight @ backward)[:, :, None, None])
    post.bias.copy_(bias + weight @ mu)


def sensitivity(vae: AutoencoderKL, latents: torch.Tensor, share: float = 0.04, step: float = 0.05) -> torch.Tensor:
    """Mean of J^T J, J being the change of all pixels by a change of one latent position. float64 [C, C].

    `latents` [B, C, h, w]. Finite differences of `step` standard deviations at a random `share` of the positions, the
    same ones for every channel.
    """
    chosen = torch.rand(latents[:, :1].shape, generator=torch.Generator().manual_seed(0)) < share
    base, changes = vae.decode(latents).sample, []
    for channel in range(latents.shape[1]):
        size = step * float(latents[:, channel].std().clamp_min(1e-6))
        moved = latents.clone()
        moved[:, channel] += size * chosen[:, 0]
        changes.append(((vae.decode(moved).sample - base) / size).flatten())
    jacobian = torch.stack(changes).double()
    return jacobian @ jacobian.T / chosen.sum()
