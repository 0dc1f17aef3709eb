"""Tiny random pipelines of the real classes, with the toy world's tokenizer and small language models as text encoders."""

from __future__ import annotations

from typing import Any

import tiny_mmdit
import torch
from diffusers import (
    AuraFlowPipeline,
    AutoencoderKLFlux2,
    ChromaPipeline,
    CogView4Pipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    QwenImagePipeline,
    ZImagePipeline,
)
from transformers import GlmConfig, GlmModel, LlavaProcessor, PixtralImageProcessorPil, Qwen3Config, Qwen3ForCausalLM

from attnctrl.toybox import text

WIDTH = 4
TEMPLATE = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %} {% endfor %}"


def _tokenizer() -> Any:
    tokenizer = text.t5_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _language_model(layers: int, width: int = WIDTH) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=128, hidden_size=width, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=1,
            num_key_value_heads=1, head_dim=4, pad_token_id=0,
        )
    )  # fmt: skip


def _ready(pipe: Any) -> Any:
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _common(transformer: Any) -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"transformer": transformer, "scheduler": scheduler, "vae": None, "tokenizer": _tokenizer()}


def _flux2_vae() -> AutoencoderKLFlux2:
    """One pixel of the latents for one of the picture."""
    return AutoencoderKLFlux2(
        block_out_channels=(4,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1, latent_channels=2, norm_num_groups=2, mid_block_add_attention=False,
    )  # fmt: skip


def flux2(seed: int = 0) -> Flux2KleinPipeline:
    """klein: two pixels a token; three layers of the language model side by side are the text."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {**_common(tiny_mmdit.flux2()), "vae": _flux2_vae()}
        return _ready(Flux2KleinPipeline(text_encoder=_language_model(28), **parts))


def _processor(padding_side: str) -> LlavaProcessor:
    """The sibling of dev's own that needs no torchvision; its template begins with a token that the tokenizer would add."""
    tokenizer = _tokenizer()
    tokenizer.bos_token, tokenizer.padding_side = "<unk>", padding_side
    # a token of its own, which the processor looks for in every prompt
    tokenizer.add_tokens("<image>")
    return LlavaProcessor(PixtralImageProcessorPil(), tokenizer, chat_template="{{ bos_token }} " + TEMPLATE)


def flux2_dev(seed: int = 0, *, padding_side: str = "right") -> Flux2Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = {**_common(tiny_mmdit.flux2()), "vae": _flux2_vae(), "tokenizer": _processor(padding_side)}
        pipe = _ready(Flux2Pipeline(text_encoder=_language_model(31), **parts))
    pipe.system_message = "a picture"
    return pipe


def qwen(seed: int = 0) -> QwenImagePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = _ready(QwenImagePipeline(text_encoder=_language_model(2, 12), **_common(tiny_mmdit.qwen())))
    # the real head is 34 tokens of another vocabulary
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a b {} c", 2
    return pipe


def chroma(seed: int = 0) -> ChromaPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        encoder = text.t5_encoder(tokenizer, width=12, layers=1)
        return _ready(ChromaPipeline(text_encoder=encoder, **_common(tiny_mmdit.chroma())))


def zimage(seed: int = 0) -> ZImagePipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = tiny_mmdit.zimage(all_patch_size=(2,))
        return _ready(ZImagePipeline(text_encoder=_language_model(2, 12), **_common(transformer)))


def auraflow(seed: int = 0) -> AuraFlowPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        encoder = text.t5_encoder(tokenizer, width=12, layers=1)
        return _ready(AuraFlowPipeline(text_encoder=encoder, **_common(tiny_mmdit.auraflow())))


def cogview4(seed: int = 0) -> CogView4Pipeline:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = GlmConfig(
            vocab_size=128, hidden_size=12, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
            num_key_value_heads=1, head_dim=12, pad_token_id=0,
        )  # fmt: skip
        return _ready(CogView4Pipeline(text_encoder=GlmModel(config), **_common(tiny_mmdit.cogview4())))
