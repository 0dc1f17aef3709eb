"""One step of flow training for a toy FLUX: batches, the loss with its two teaching heads, optimisers and averages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor, nn

from . import text, world
from .data import COLORS, PATTERNS, REFERENCE_SIZE, SHAPES, TOKEN_PIXELS, Shard, truth
from .muon import Muon

SUBJECT_WEIGHTS = (0.5, 0.4, 0.07, 0.03)
REFERENCE_SHARE = 0.08
DROP_CAPTION = 0.1
STYLE_WEIGHTS = {"flat": 1.0, "outlined": 0.6, "hatched": 0.2, "grainy": 0.2}
"""How often scenes of a style are drawn: hatching and grain are costly to learn and say little about the subjects."""
PAD_FULL = 0.15


def position_ids(rows: int, columns: int, picture: int = 0) -> Tensor:
    """FLUX's ids (picture, y, x) of a token grid, float32 [rows * columns, 3]; references carry picture = 1."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = picture
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    return ids.reshape(-1, 3)


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


@dataclass
class Batch:
    """Clean tokens [B, T, 64], reference tokens or None, captions, text length, token grid, truth of the tokens."""

    tokens: Tensor
    reference: Tensor | None
    captions: list[str]
    length: int
    grid: tuple[int, int]
    truth: dict[str, Tensor]


def draw(
    shards: dict[tuple[int, int], dict[int, Shard]],
    rng: np.random.Generator,
    batch: int,
    sizes: list[Any],
    weights: list[float],
) -> Batch:
    """One batch of equal canvas size and number of subjects; captions are made anew."""
    size = sizes[int(rng.choice(len(sizes), p=weights))]
    shard = shards[size][int(rng.choice(4, p=SUBJECT_WEIGHTS)) + 1]
    odds = np.array([STYLE_WEIGHTS[scene.style.name] for scene in shard.scenes])
    picks = rng.choice(len(shard.scenes), batch, p=odds / odds.sum())
    shows = rng.random() < REFERENCE_SHARE
    captions = []
    for pick in picks:
        this = int(shard.shown[pick]) if shows else None
        told = world.caption(shard.scenes[pick], rng, this=this)
        captions.append("" if rng.random() < DROP_CAPTION else told)
    index = torch.from_numpy(picks)
    longest = max(len(c.replace(",", " ,").split()) for c in captions) + 1
    # The stock pipeline pads to the full length without a mask; region texts come without pads: the model meets both.
    length = text.MAX_LENGTH if rng.random() < PAD_FULL else min(text.MAX_LENGTH, longest + int(rng.integers(0, 4)))
    reference = shard.reference[index].float() if shows else None
    return Batch(shard.tokens[index].float(), reference, captions, length, shard.grid, truth(shard, picks))


class Flow:
    """Model, teachers, optimisers and the exponential moving average of a training run."""

    def __init__(
        self,
        pipeline: FluxPipeline,
        weights: Tensor | float = 1.0,
        lr: float = 2e-3,
        muon_lr: float = 0.02,
        decay: float = 0.99,
    ) -> None:
        self.pipeline = pipeline
        self.weights = weights
        transformer = pipeline.transformer
        width = transformer.config.num_attention_heads * transformer.config.attention_head_dim
        self.teachers = nn.ModuleList([Teacher(width), Teacher(width)])
        self.modules = nn.ModuleDict(
            {
                "transformer": transformer,
                "text_encoder": pipeline.text_encoder,
                "text_encoder_2": pipeline.text_encoder_2,
            }
        )
        self._start_as_identity()
        self._hidden: list[Tensor] = []
        for block in (transformer.transformer_blocks[-1], transformer.single_transformer_blocks[1]):
            block.register_forward_hook(lambda _m, _a, out: self._hidden.append(out[1]))
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in self.modules.named_parameters():
            block = "blocks." in name and ".norm" not in name
            encoder = "encoder" in name and "embed" not in name and "shared" not in name
            (matrices if (block or encoder) and parameter.dim() == 2 and min(parameter.shape) > 16 else rest).append(
                parameter
            )
        self.optimizers = [
            Muon(matrices, lr=muon_lr),
            torch.optim.AdamW([*rest, *self.teachers.parameters()], lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = [group["lr"] for o in self.optimizers for group in o.param_groups]
        self.decay = decay
        self.average = {k: v.detach().clone() for k, v in self.modules.state_dict().items()}

    def _start_as_identity(self) -> None:
        with torch.no_grad():
            for name, parameter in self.modules["transformer"].named_parameters():
                if ("norm" in name and "linear" in name) or name.startswith("proj_out"):
                    parameter.zero_()

    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, float]:
        """Rectified-flow loss plus the teachers' twentieths; the second value is the flow part alone."""
        pipe = self.pipeline
        t5 = pipe.tokenizer_2(
            batch.captions, padding="max_length", max_length=batch.length, truncation=True, return_tensors="pt"
        )
        clip = pipe.tokenizer(batch.captions, padding="longest", return_tensors="pt")
        prompt = pipe.text_encoder_2(t5.input_ids)[0]
        pooled = pipe.text_encoder(clip.input_ids).pooler_output
        clean = batch.tokens
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(len(clean), generator=generator) + 0.4)
        hidden = torch.lerp(clean, noise, sigma[:, None, None])
        ids = position_ids(*batch.grid)
        count = clean.shape[1]
        if batch.reference is not None:
            side = REFERENCE_SIZE // TOKEN_PIXELS
            hidden = torch.cat([hidden, batch.reference], 1)
            ids = torch.cat([ids, position_ids(side, side, 1)])
        self._hidden.clear()
        velocity = pipe.transformer(
            hidden_states=hidden, timestep=sigma, encoder_hidden_states=prompt, pooled_projections=pooled,
            txt_ids=torch.zeros(batch.length, 3), img_ids=ids, return_dict=False,
        )[0][:, :count]  # fmt: skip
        flow = ((velocity - (noise - clean)).square() * self.weights).mean()
        taught = sum(teacher(h[:, :count], batch.truth) for teacher, h in zip(self.teachers, self._hidden, strict=True))
        return flow + 0.05 * taught, float(flow.detach())

    def step(self, batch: Batch, generator: torch.Generator, factor: float) -> float:
        """One update with learning rates scaled by `factor`; returns the flow loss."""
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
