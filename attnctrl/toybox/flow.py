"""One step of training for a toy model: batches, the loss with its two teaching heads, optimisers and averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import text, world
from .data import COLORS, PATTERNS, SHAPES, Shard, truth
from .models.base import Conditions, Recipe
from .muon import Muon

SUBJECT_WEIGHTS = (0.5, 0.4, 0.07, 0.03)
REFERENCE_SHARE = 0.08
DROP_CAPTION = 0.1
STYLE_WEIGHTS = {"flat": 1.0, "outlined": 0.6, "hatched": 0.2, "grainy": 0.2}
"""How often scenes of a style are drawn: hatching and grain are costly to learn and say little about the subjects."""
PAD_FULL = 0.15


class Teacher(nn.Module):
    """Predicts the truth of every image token from hidden states; dropped after training (representation alignment)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = {"shape": len(SHAPES) + 1, "color": len(COLORS) + 1, "pattern": len(PATTERNS) + 1}
        self.head = nn.Linear(width, sum(self.sizes.values()) + 3)

    def forward(self, hidden: Tensor, target: dict[str, Tensor]) -> Tensor:
        parts = self.head(F.layer_norm(hidden, hidden.shape[-1:])).split([*self.sizes.values(), 3], dim=-1)
        loss = ((parts[-1] - target["place"]).square() * target["present"]).mean()
        for name, logits in zip(self.sizes, parts, strict=False):
            loss = loss + F.cross_entropy(logits.flatten(0, 1), target[name].flatten())
        return loss


def channel_weights(tokens: Tensor) -> Tensor:
    """Weights of the flow loss for the channels of tokens [N, T, C]: those that never vary show in no picture."""
    return torch.where(tokens.float().flatten(0, 1).std(0) > 1e-3, 1.0, 0.02)


@dataclass(frozen=True)
class Batch:
    """Clean tokens [B, T, 64], what the denoiser is told of them, and the truth of every token."""

    tokens: Tensor
    told: Conditions
    truth: dict[str, Tensor]


def draw(
    shards: dict[tuple[int, int], dict[int, Shard]],
    rng: np.random.Generator,
    batch: int,
    sizes: list[Any],
    weights: list[float],
    references: float = REFERENCE_SHARE,
) -> Batch:
    """One batch of equal canvas size and number of subjects; captions are made anew, a share shows references."""
    size = sizes[int(rng.choice(len(sizes), p=weights))]
    shard = shards[size][int(rng.choice(4, p=SUBJECT_WEIGHTS)) + 1]
    odds = np.array([STYLE_WEIGHTS[scene.style.name] for scene in shard.scenes])
    picks = rng.choice(len(shard.scenes), batch, p=odds / odds.sum())
    shows = rng.random() < references
    captions = []
    for pick in picks:
        this = int(shard.shown[pick]) if shows else None
        caption = world.caption(shard.scenes[pick], rng, this=this)
        captions.append("" if rng.random() < DROP_CAPTION else caption)
    index = torch.from_numpy(picks)
    longest = max(len(c.replace(",", " ,").split()) for c in captions) + 1
    # The stock pipeline pads to the full length without a mask; region texts come without pads: the model meets both.
    length = text.MAX_LENGTH if rng.random() < PAD_FULL else min(text.MAX_LENGTH, longest + int(rng.integers(0, 4)))
    reference = shard.reference[index].float() if shows else None
    told = Conditions(captions, length, shard.grid, reference)
    return Batch(shard.tokens[index].float(), told, truth(shard, picks))


class Flow:
    """Model, teachers, optimisers and the exponential moving average of a training run."""

    def __init__(
        self,
        recipe: Recipe,
        pipeline: Any,
        weights: Tensor | float = 1.0,
        lr: float = 2e-3,
        muon_lr: float = 0.02,
        decay: float = 0.99,
    ) -> None:
        self.recipe, self.pipeline, self.weights = recipe, pipeline, weights
        self.noise = recipe.noise(pipeline)
        heard = recipe.hear(pipeline)
        self.teachers = nn.ModuleList([Teacher(width) for _, width in heard])
        self.modules = nn.ModuleDict({name: getattr(pipeline, name) for name in recipe.trained})
        with torch.no_grad():
            for name, parameter in self.modules[recipe.trained[0]].named_parameters():
                if recipe.silent(name):
                    parameter.zero_()
        self._hidden: list[Tensor] = []
        for (layer, take), _ in heard:
            layer.register_forward_hook(lambda _m, _a, out, take=take: self._hidden.append(take(out)))
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.modules.named_parameters():
            block = "block" in name and ".norm" not in name
            encoder = "encoder" in name and "embed" not in name and "shared" not in name
            wide = parameter.dim() in (2, 4) and min(parameter.flatten(1).shape) > 16
            (matrices if (block or encoder) and wide else rest).append(parameter)
        self.optimizers = [
            Muon(matrices, lr=muon_lr),
            torch.optim.AdamW([*rest, *self.teachers.parameters()], lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.decay = decay
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
        """The denoiser's squared error plus the teachers' twentieths; the second value is the first part alone."""
        clean = batch.tokens
        noise = torch.randn(clean.shape, generator=generator)
        times = self.noise.times(len(clean), generator)
        self._hidden.clear()
        answer = self.recipe.predict(self.pipeline, self.noise.mix(clean, noise, times), times, batch.told)
        error = ((answer - self.noise.target(clean, noise, times)).square() * self.weights).mean()
        count = clean.shape[1]
        heard = zip(self.teachers, self._hidden, strict=True)
        taught = sum(teacher(hidden[:, :count], batch.truth) for teacher, hidden in heard)
        return error + 0.05 * taught, float(error.detach())

    def step(self, batch: Batch, generator: torch.Generator, factor: float) -> float:
        """One update with learning rates scaled by `factor`; returns the denoiser's squared error."""
        for group, rate in zip((g for o in self.optimizers for g in o.param_groups), self.rates, strict=True):
            group["lr"] = rate * factor
        for o in self.optimizers:
            o.zero_grad(set_to_none=True)
        loss, flow = self.loss(batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for o in self.optimizers:
            o.step()
        with torch.no_grad():
            live = self.modules.state_dict()
            floats = [k for k, v in live.items() if v.is_floating_point()]
            torch._foreach_lerp_([self.average[k] for k in floats], [live[k] for k in floats], 1 - self.decay)
        return flow

    def swap_average(self) -> None:
        """Exchange the live weights with the averaged ones (call twice around sampling or saving)."""
        live = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        self.average = live

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as flat tensors."""
        out = {f"live.{k}": v for k, v in self.modules.state_dict().items()}
        out |= {f"average.{k}": v for k, v in self.average.items()}
        out |= {f"teacher.{k}": v for k, v in self.teachers.state_dict().items()}
        for o, optimizer in enumerate(self.optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                out |= {f"optimizer.{o}.{index}.{k}": torch.as_tensor(v) for k, v in entries.items()}
        return {k: v.detach().clone().contiguous() for k, v in out.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}

        self.modules.load_state_dict(part("live."))
        self.average = part("average.")
        self.teachers.load_state_dict(part("teacher."))
        for o, optimizer in enumerate(self.optimizers):
            entries: dict[int, dict[str, Tensor]] = {}
            for key, value in part(f"optimizer.{o}.").items():
                index, name = key.split(".", 1)
                entries.setdefault(int(index), {})[name] = value
            full = optimizer.state_dict()
            full["state"] = entries
            optimizer.load_state_dict(full)
