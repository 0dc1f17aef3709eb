"""The texts that controls append to the prompt of a forward, as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import LayoutError
from .families import Text
from .region import Region
from .stack import Stack
from .variants import Variant

__all__ = ["Texts"]

Embeds = Callable[[Region], Tensor]
"""A region's encoded prompt, [tokens, channels]."""


class Texts:
    """Puts appended texts together, once for all steps of a phase."""

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor] | None = None

    def make(self, stack: Stack, prompts: Text, variants: Sequence[Variant], tokens: int, embeds: Embeds) -> Tensor:
        """The appended text of all rows, [B, tokens, channels].

        Args:
            stack: whose controls append.
            prompts: what the model is given, one row or as many as variants.
            variants: of each row.
            tokens: that are appended.
            embeds: encodes a region's text.

        Raises:
            LayoutError: when texts have other channels than the prompt.
        """
        prompt = prompts[0]
        key = (stack, tuple(variants), tokens, prompt.shape[-1], prompt.device, prompt.dtype)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        copied = any(stack.filling(one.scene, one.active, len(prompt)) for one in dict.fromkeys(variants))
        if copied:
            pairs = zip(prompts, variants, strict=True)
            text = torch.stack([_of_row(stack, row, one, tokens, embeds) for row, one in pairs])
        else:
            made = {one: _of_row(stack, prompt, one, tokens, embeds) for one in dict.fromkeys(variants)}
            text = torch.stack([made[variant] for variant in variants])
        # what carries gradients belongs to one graph, and copies belong to one prompt
        self._last = None if text.requires_grad or copied else (key, text)
        return text


def _of_row(stack: Stack, prompt: Tensor, variant: Variant, tokens: int, embeds: Embeds) -> Tensor:
    """[tokens, channels] of one row, the padding of whose `prompt` [tokens, channels] some controls copy."""
    text = prompt.new_zeros(tokens, prompt.shape[-1])
    placed = {k: v for k, v in variant.frames.ranges.items() if k.startswith(("text.region", "text.pad"))}
    if not placed:
        return text
    begin = min(item.start for item in placed.values())
    if variant.frames.fixed:
        # texts that take the place of the prompt's padding stand at its end
        begin = max(item.stop for item in placed.values()) - tokens
    copies = prompt[stack.filling(variant.scene, variant.active, len(prompt))]
    for number, region in stack.texts(variant.scene, variant.active):
        encoded = copies[:0] if region.spans else embeds(region)
        if encoded.shape[-1] != prompt.shape[-1]:
            raise LayoutError(
                f"Region '{region.label}': prompt_embeds have {encoded.shape[-1]} channels, the prompt has "
                f"{prompt.shape[-1]}. Encode it with the model's own text encoder."
            )
        start = placed[f"text.region{number}"].start - begin
        own = torch.cat([encoded.to(device=prompt.device, dtype=prompt.dtype), copies])
        text[start : start + len(own)] = own
    return text
