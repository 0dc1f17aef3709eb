"""Tiny random pipelines of the real classes whose models read a padded text and its mask."""

from __future__ import annotations

from typing import Any

import tiny_mmdit
import tiny_video
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, Lumina2Pipeline
from tiny import TEXT_DIM
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

from attnctrl.toybox import text


def _ready(pipe: Any) -> Any:
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _language_model(layers: int) -> LlamaModel:
    sizes = {"hidden_size": TEXT_DIM, "intermediate_size": 8, "num_hidden_layers": layers, "vocab_size": 128}
    return LlamaModel(LlamaConfig(num_attention_heads=1, num_key_value_heads=1, head_dim=12, pad_token_id=0, **sizes))


def _clip(tokenizer: Any) -> CLIPTextModel:
    """With room for the 77 tokens that the pipeline insists on."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))


def hunyuan_video(seed: int = 0) -> HunyuanVideoPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clip = text.clip_tokenizer()
        pipe = HunyuanVideoPipeline(
            text_encoder=_language_model(3),
            tokenizer=text.t5_tokenizer(),
            transformer=tiny_video.hunyuan_video(guidance_embeds=True),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=_clip(clip),
            tokenizer_2=clip,
        )
    return _ready(pipe)


def lumina2(seed: int = 0) -> Lumina2Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = Lumina2Pipeline(
            text_encoder=_language_model(2),
            tokenizer=text.t5_tokenizer(),
            transformer=tiny_mmdit.lumina2(),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        )
    # the real one is of another vocabulary
    pipe.system_prompt = "a picture"
    return _ready(pipe)
