"""Real tokenizers with a toy vocabulary, and small CLIP and T5 encoders: one token for every word of the world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .world import WORDS

MAX_LENGTH = 40
"""Tokens of the longest caption of four fully told subjects, background, style and the end token: 38, rounded up."""


def t5_tokenizer() -> T5Tokenizer:
    """Unigram tokenizer: one piece a word of the world, single letters as the fallback for anything else."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocabulary += [("▁" + word if word.isalpha() else word, -1.0) for word in WORDS]
    vocabulary += [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=MAX_LENGTH)


def byte_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Merges that make each word one piece, the commonest pair first and equal ones in alphabetical order.

    `tokenizers.trainers.BpeTrainer` breaks ties at random, and token ids must be the same in every process.
    """
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for piece in pieces for pair in pairwise(piece)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(piece, best) for piece in pieces]
    return merges


def _merged(piece: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in piece:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer in which every word of the world is one token, and printable letters the fallback."""
    letters = [chr(c) for c in range(33, 127)]
    merges = byte_pairs(WORDS)
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    vocabulary = {
        piece: index for index, piece in enumerate([*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"])
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def clip_encoder(
    tokenizer: CLIPTokenizer, width: int = 128, layers: int = 2, heads: int = 4, projection: bool = False
) -> Any:
    """A randomly initialised CLIP text encoder, its pooled output projected or not (global RNG: seed it before)."""
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=heads, max_position_embeddings=MAX_LENGTH, projection_dim=width,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def t5_encoder(tokenizer: T5Tokenizer, width: int = 128, layers: int = 2, heads: int = 4) -> T5EncoderModel:
    """A randomly initialised T5 encoder (global RNG: seed it before)."""
    model = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=width // heads, d_ff=2 * width, num_layers=layers,
            num_heads=heads, relative_attention_num_buckets=16, relative_attention_max_distance=32, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.shared.weight.normal_(0.0, 1.0)
    return model
