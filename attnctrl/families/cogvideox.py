"""CogVideoX 1.0 and 1.5, text to video and image to video: joint attention over [text, film].

Film tokens stand in the order (frame, row, column) and a region is the same in every frame. Guidance runs as one batch,
the negative prompt's rows first; the pipelines do not tell whether a run is guided, so a batch needs
`attach(..., branches=("uncond", "cond"))`, or ("cond",) without guidance. Rotary positions are the film's alone, so
further texts need none. CogVideoX-2b and CogVideoX-5b-I2V add positions to a sequence of one length, the text included;
there only controls without texts can act.
"""

from __future__ import annotations

from typing import Any

from ..layout import Measures
from . import IMAGE_TEXT, Arguments, Family, append_to, encode_alone, joint, stacks, text_limit


def measure(model: Any, arguments: Arguments) -> Measures:
    """Sizes from the latents [B, frames, C, H, W], the model's patch sizes and `encoder_hidden_states`."""
    frames, _, height, width = arguments["hidden_states"].shape[1:]
    patch: Any = model.config.patch_size
    grid = (frames // (model.config.patch_size_t or 1), height // patch, width // patch)
    embed, closed = model.patch_embed, ""
    if embed.use_positional_embeddings or embed.use_learned_positional_embeddings:
        closed = (
            f"this CogVideoX adds positions to a sequence with exactly {embed.max_text_seq_length} tokens of text. Use "
            "a model with rotary positions alone (CogVideoX-5b, CogVideoX1.5), or controls without texts such as "
            "Isolate."
        )
    return Measures(arguments["encoder_hidden_states"].shape[1], grid, closed=closed)


def count_tokens(pipe: Any, prompt: str) -> int:
    """T5 tokens of a prompt, its end token included, at most 226."""
    return len(pipe.tokenizer(prompt, truncation=True, max_length=text_limit(pipe)).input_ids)


COGVIDEOX = Family(
    name="cogvideox",
    models=("CogVideoXTransformer3DModel",),
    layers=stacks(("joint", "transformer_blocks", "attn1", "joint")),
    measure=measure,
    arrange=joint("text", "image"),
    batch=("uncond", "cond"),
    pixels_per_token=16,
    timestep=lambda arguments: arguments["timestep"],
    append_text=append_to(),
    encode=encode_alone(count_tokens),
    count=count_tokens,
    returns={"joint": IMAGE_TEXT},
)
