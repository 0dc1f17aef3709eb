"""Tiny random pipelines of the real classes whose models read a padded text and its mask."""

from __future__ import annotations

from typing import Any

import tiny_mmdit
import tiny_video
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline, HunyuanVideoPipeline, Lumina2Pipeline
from diffusers.guiders import AdaptiveProjectedMixGuidance
from tiny import TEXT_DIM
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)

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


def hunyuan_image(seed: int = 0) -> HunyuanImagePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        glyphs = T5Config(vocab_size=384, d_model=6, d_kv=6, d_ff=8, num_layers=1, num_heads=1)
        pipe = HunyuanImagePipeline(
            text_encoder=_language_model(3),
            tokenizer=text.t5_tokenizer(),
            text_encoder_2=T5EncoderModel(glyphs),
            tokenizer_2=ByT5Tokenizer(),
            transformer=tiny_mmdit.hunyuan_image(),
            vae=None,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            guider=AdaptiveProjectedMixGuidance(guidance_scale=3.0),
        )
    # the real head is 34 tokens of another vocabulary
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a b {} c", 2
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 40, 32
    return _ready(pipe)
