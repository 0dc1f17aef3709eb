"""Tokenizers whose tokens the denoiser reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Reader"]


def _as_it_is(pipe: Any, prompt: str) -> str:
    return prompt


def _at_the_start(pipe: Any) -> int:
    return 0


@dataclass(frozen=True)
class Reader:
    """A tokenizer of a pipeline whose tokens stand in the text sequence.

    Attributes:
        tokenizer: name of the pipeline's component; readers whose component is None are passed over.
        written: (pipeline, prompt) -> what the tokenizer is given, a template with the prompt in it, say.
        begin: pipeline -> place of its first token in the text sequence; negative where leading tokens are dropped.
        limit: pipeline -> the most tokens that are kept, whatever its call is told; None where `max_sequence_length` of
            the call says it. Leading tokens that are dropped do not count.
        filled: options of the tokenizer's call, where padding is part of the text sequence and may come first.
    """

    tokenizer: str = "tokenizer"
    written: Callable[[Any, str], str] = _as_it_is
    begin: Callable[[Any], int] = _at_the_start
    limit: Callable[[Any], int] | None = None
    filled: Mapping[str, Any] = field(default_factory=dict)
