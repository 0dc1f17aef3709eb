"""UNets of Stable Diffusion 1.x, 2.x and XL: self-attention of the image, cross attention to the text, per level.

Guidance runs as one batch, the negative prompt's rows first. Of cross attention with an IP-Adapter the first kernel
call reads the text; the others, which read its pictures, stay as they are.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import Frame, Frames, Layout, Measures
from ..select import Layer
from . import Arguments, Family, append_to, still
from .reader import Reader

_PLACE = re.compile(r"(down|up)_blocks\.(\d+)\.|(mid)_block\.")


def layers(model: Any) -> tuple[Layer, ...]:
    """Attention of transformer blocks in forward order; stacks "down.self", "down.cross", "mid.self", and so on.

    Frames are named by kind and level; level l has latents halved l times.
    """
    found: list[Layer] = []
    counts: dict[str, int] = {}
    levels: int = len(model.config.block_out_channels)
    order = {"down": 0, "mid": 1, "up": 2}
    placed = [(match, name, module) for name, module in model.named_modules() if (match := _matched(name, module))]
    for match, name, module in sorted(placed, key=lambda item: order[item[0][1] or item[0][3]]):
        side, block = match[1] or match[3], int(match[2] or 0)
        level = {"down": block, "mid": levels - 1, "up": levels - 1 - block}[side]
        kind = "cross" if name.endswith("attn2") and _reads_text(module) else "self"
        stack = f"{side}.{kind}"
        found.append(Layer(name, stack, counts.get(stack, 0), module, f"{kind}{level}"))
        counts[stack] = counts.get(stack, 0) + 1
    return tuple(found)


def _matched(name: str, module: nn.Module) -> re.Match[str] | None:
    return _PLACE.match(name) if re.search(r"\.attn[12]$", name) and hasattr(module, "processor") else None


def _reads_text(module: nn.Module) -> bool:
    return bool(getattr(module, "is_cross_attention", True))


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from the latents [B, C, H, W] and `encoder_hidden_states`."""
    return Measures(arguments["encoder_hidden_states"].shape[1], tuple(arguments["sample"].shape[-2:]))


def arrange(model: Any, measures: Measures) -> Frames:
    """Frames "self0", "cross0", "self1", ...: each level halves the grid, rounding up."""
    frames: dict[str, Frame] = {}
    text = Layout.of(order=("text",), **vars(measures))
    rows, columns = measures.image
    for level in range(len(model.config.block_out_channels)):
        image = Layout.of(order=("image",), text=measures.text, image=(rows, columns))
        frames |= {f"self{level}": Frame.joint(image), f"cross{level}": Frame(image, text)}
        rows, columns = -(-rows // 2), -(-columns // 2)
    return Frames.of(**frames)


def parts(block: Any) -> list[str]:
    """Of a level its residual and attention blocks by turns; of these their transformer blocks."""
    inner = len(getattr(block, "transformer_blocks", ()))
    pairs = ((f"resnets.{index}", f"attentions.{index}") for index in range(len(getattr(block, "resnets", ()))))
    found = [f"transformer_blocks.{index}" for index in range(inner)] or [name for pair in pairs for name in pair]
    there = {name for name, _ in block.named_modules()}
    return [name for name in found if name in there]


def count_tokens(pipe: Any, prompt: str) -> int:
    """CLIP's full length, padding included: Stable Diffusion reads it as well."""
    return int(pipe.tokenizer.model_max_length)


@torch.no_grad()
def encode_prompt(pipe: Any, prompt: str) -> Tensor:
    """Embedding of one prompt by itself: [77, channels]; that of both text encoders side by side in SDXL."""
    return pipe.encode_prompt(
        prompt, device=pipe._execution_device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0][0]


UNET = Family(
    name="unet",
    models=("UNet2DConditionModel",),
    layers=layers,
    measure=measure,
    arrange=arrange,
    batch=("uncond", "cond"),
    # layers of perturbed-attention guidance (PAG, SEG), of ConsiStory and StoryDiffusion, and the same ones to edit
    presets={"middle": lambda counts: "mid.self", "shared": lambda counts: "up.self", "edit": lambda counts: "up.self"},
    hidden="sample",
    pixels_per_token=8,
    timestep=lambda arguments: torch.as_tensor(arguments["timestep"]),
    append_text=append_to("encoder_attention_mask"),
    encode=encode_prompt,
    count=count_tokens,
    lists=("down_blocks", "mid_block", "up_blocks"),
    read_later=("down_blocks",),
    parts=parts,
    readers=(Reader(limit=lambda pipe: pipe.tokenizer.model_max_length),),
    corner=still,
)
