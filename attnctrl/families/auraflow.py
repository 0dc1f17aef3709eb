"""AuraFlow: joint attention over [8 learned registers, text, image].

Positions are added to the image once, before the first block; texts have none. Guidance runs as one batch, the negative
prompt's rows first.
"""

from __future__ import annotations

from typing import Any

from ..layout import Frames, Measures
from . import TEXT_IMAGE, Family, append_to, encode_alone, joint, stacks, still
from .reader import Reader
from .sd3 import measure

_MOST = 256


def arrange(model: Any, measures: Measures) -> Frames:
    """One frame, "joint"."""
    return joint("registers", "text", "image", registers=model.register_tokens.shape[1])(model, measures)


def count_tokens(pipe: Any, prompt: str) -> int:
    """Tokens of a prompt, its end token included, at most 256."""
    return len(pipe.tokenizer(prompt, truncation=True, max_length=_MOST).input_ids)


AURAFLOW = Family(
    name="auraflow",
    models=("AuraFlowTransformer2DModel",),
    layers=stacks(
        ("joint", "joint_transformer_blocks", "attn", "joint"), ("single", "single_transformer_blocks", "attn", "joint")
    ),
    measure=measure,
    arrange=arrange,
    batch=("uncond", "cond"),
    pixels_per_token=16,
    timestep=lambda arguments: 1000 * arguments["timestep"],
    sigma=lambda timestep: timestep / 1000,
    append_text=append_to(),
    encode=encode_alone(count_tokens),
    count=count_tokens,
    readers=(Reader(),),
    corner=still,
    table="pos_embed",
    returns={"joint": TEXT_IMAGE},
)
