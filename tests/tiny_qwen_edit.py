"""A tiny random Qwen-Image-Edit-Plus: its language model really sees the pictures."""

from __future__ import annotations

import re
from typing import Any

import tiny_mmdit
import tiny_mmdit_pipes
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from transformers import BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

WIDTH = 12
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PAD = MARKS[2]


class Processor:
    """Tokenizer and picture processor as Qwen2VLProcessor joins them; that one wants torchvision for films."""

    def __init__(self) -> None:
        self.tokenizer = tiny_mmdit_pipes._tokenizer()
        self.tokenizer.add_tokens(list(MARKS), special_tokens=True)
        self.pictures = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=256)

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> BatchFeature:
        seen = {} if images is None else self.pictures(images=images, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(1) // 4).tolist() if seen else [])
        written = [re.sub(re.escape(PAD), lambda _: PAD * int(next(counts)), one) for one in text]
        return BatchFeature({**self.tokenizer(written, **options), **seen})


def _language_model(marks: dict[str, int]) -> Qwen2_5_VLForConditionalGeneration:
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 128, "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
        },
        vision_config={
            "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH,
            "patch_size": 4, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0],
        },
        image_token_id=marks[PAD], video_token_id=marks[MARKS[3]], vision_start_token_id=marks[MARKS[0]],
        vision_end_token_id=marks[MARKS[1]],
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen_edit_plus(seed: int = 0) -> QwenImageEditPlusPipeline:
    processor = Processor()
    marks = {mark: processor.tokenizer.convert_tokens_to_ids(mark) for mark in MARKS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = QwenImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=tiny_mmdit.qwen(), processor=processor,
            vae=AutoencoderKLQwenImage(
                base_dim=4, z_dim=2, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
                latents_mean=[0.0] * 2, latents_std=[1.0] * 2,
            ),
            text_encoder=_language_model(marks), tokenizer=processor.tokenizer,
        )  # fmt: skip
    # the real head is 64 tokens of another vocabulary
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "a b {} c", 2
    return tiny_mmdit_pipes._ready(pipe)
