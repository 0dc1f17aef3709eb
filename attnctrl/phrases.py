"""Where the words of a prompt stand in the text tokens that a model reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from .attach import parts_of
from .errors import LayoutError, UnsupportedModelError
from .families import Reader, family_of, text_limit
from .layout import Span
from .region import Region

__all__ = ["TextEncoding", "in_prompt", "phrase_spans"]

TextEncoding = Literal["separate", "joint", "auto"]


def in_prompt(
    pipe: Any,
    prompt: str,
    regions: Sequence[Region],
    text_encoding: TextEncoding = "joint",
    *,
    max_sequence_length: int | None = None,
) -> list[Region]:
    """The regions with their texts bound to the words of the prompt, which are encoded together with all the others.

    A text that several regions have belongs to them in the order in which it occurs; that of one region alone belongs
    to it wherever it occurs. Regions with spans, with prompt_embeds or without a text stay what they are.

    Args:
        pipe, max_sequence_length: as for `phrase_spans`.
        prompt: as the pipeline is given it.
        text_encoding: "joint", every region's text must stand in the prompt; "separate", none is sought there; "auto",
            those that the prompt does not hold, or holds as words of an earlier region, stay texts of their own.

    Raises:
        LayoutError, UnsupportedModelError: for "joint", as from `phrase_spans`.
    """
    if text_encoding == "separate":
        return list(regions)
    texts = Counter(_text(region) for region in regions)
    bound: list[Region] = []
    taken: set[int] = set()
    met: Counter[str] = Counter()
    for region in regions:
        text = _text(region)
        if text:
            number = met[text] if texts[text] > 1 else None
            met[text] += 1
            try:
                spans = phrase_spans(pipe, prompt, text, number, max_sequence_length=max_sequence_length)
            except (LayoutError, UnsupportedModelError):
                if text_encoding == "joint":
                    raise
                spans = ()
            tokens = {token for start, stop in spans for token in range(start, stop)}
            if text_encoding == "joint" or not tokens & taken:
                taken |= tokens
                region = replace(region, spans=spans)
        bound.append(region)
    return bound


def _text(region: Region) -> str:
    """What is to be found in the prompt."""
    return "" if region.spans or region.prompt_embeds is not None else region.prompt.strip()


def phrase_spans(
    pipe: Any, prompt: str, phrase: str, occurrence: int | None = None, *, max_sequence_length: int | None = None
) -> tuple[Span, ...]:
    """The tokens of `phrase` in the encoded `prompt`, for every text encoder that the denoiser reads side by side.

    A phrase is whole words, sought as written and then without regard to case.

    Args:
        pipe: a pipeline whose family knows its tokenizers.
        prompt: as the pipeline is given it.
        phrase: part of the prompt.
        occurrence: 0 for the first time the phrase occurs, and so on; None for all of them.
        max_sequence_length: as the pipeline's call is given it; None where it has its default. It says where a prompt
            ends, and where it begins when it is filled up from the left (FLUX.2 dev, by its tokenizer).

    Returns:
        Spans in the order of the sequence, neighbours joined; places as in the prompt's embeddings
        (`Layout["text.global"]`).

    Raises:
        LayoutError: when the prompt does not hold the phrase (as often), the tokenizer cuts it off, or the pipeline
            rewrites the prompt before it reads it.
        UnsupportedModelError: when the family's or the tokenizer's places are not known.
    """
    family = family_of(parts_of(pipe)[0])
    readers = [reader for reader in family.readers if getattr(pipe, reader.tokenizer, None) is not None]
    if not readers:
        raise UnsupportedModelError(
            f"Where phrases stand is not known for {type(pipe).__name__}; give the phrase a region with a text of its "
            "own instead."
        )
    places = _occurrences(prompt, phrase, occurrence)
    return tuple(span for reader in readers for span in _read(pipe, reader, prompt, places, max_sequence_length))


def _occurrences(prompt: str, phrase: str, occurrence: int | None) -> list[Span]:
    """Characters [start, stop) of each place."""
    words = phrase.strip()
    pattern = rf"(?<!\w){re.escape(words)}(?!\w)"
    found = [match.span() for match in re.finditer(pattern, prompt)] if words else []
    if words and not found:
        found = [match.span() for match in re.finditer(pattern, prompt, re.IGNORECASE)]
    if not found:
        raise LayoutError(
            f"The phrase '{phrase}' is not in the prompt '{prompt}'. Give whole words of the prompt, as they are "
            "written there."
        )
    if occurrence is None:
        return found
    if not 0 <= occurrence < len(found):
        raise LayoutError(
            f"The phrase '{phrase}' occurs {len(found)} time(s) in the prompt '{prompt}'; asked for occurrence "
            f"{occurrence}, counted from 0."
        )
    return [found[occurrence]]


def _read(pipe: Any, reader: Reader, prompt: str, places: list[Span], asked: int | None) -> list[Span]:
    """Spans of tokens that share characters with `places`."""
    component = getattr(pipe, reader.tokenizer)
    tokenizer = getattr(component, "tokenizer", component)  # a processor's own
    if not getattr(tokenizer, "is_fast", False) or (tokenizer.padding_side != "right" and not reader.filled):
        raise UnsupportedModelError(
            f"{reader.tokenizer} ({type(tokenizer).__name__}) does not tell where its tokens stand; load one with "
            "is_fast and padding_side='right'."
        )
    convert = getattr(pipe, "maybe_convert_prompt", None)
    if convert is not None and convert(prompt, tokenizer) != prompt:
        raise UnsupportedModelError(
            f"The prompt '{prompt}' holds textual inversion tokens, which move the places of its words."
        )
    text = reader.written(pipe, prompt)
    first, begin = _first(reader, text, prompt), reader.begin(pipe)
    limit = reader.limit(pipe) if reader.limit is not None else asked or text_limit(pipe)
    told = tokenizer(
        text,
        return_offsets_mapping=True,
        truncation=True,
        max_length=limit + max(0, -begin),
        # a processor adds no special tokens to a template that begins with one
        add_special_tokens=tokenizer is component or not text.startswith(tokenizer.bos_token or "\0"),
        **reader.filled,
    )["offset_mapping"]
    spans: list[Span] = []
    for start, stop in sorted(places):
        inside = [n for n, (a, b) in enumerate(told) if a < first + stop and b > first + start]
        reach = max((told[n][1] for n in inside), default=0)
        if reach < first + stop:
            raise LayoutError(
                f"The words '{prompt[start:stop]}' are cut off: {reader.tokenizer} keeps {len(told)} tokens of the "
                "prompt. Move them to its beginning, or shorten it."
            )
        head, tail = begin + inside[0], begin + inside[-1] + 1
        if spans and spans[-1][1] == head:
            head = spans.pop()[0]
        spans.append((head, tail))
    return spans


def _first(reader: Reader, text: str, prompt: str) -> int:
    """The character of `text` at which the prompt begins."""
    # a template may quote words of the prompt; the prompt itself is its last part
    found = re.match(rf".*({re.escape(prompt.strip())})", text, re.DOTALL | re.IGNORECASE)
    if found is None:
        raise LayoutError(
            f"The prompt '{prompt}' is rewritten before {reader.tokenizer} is given it, as '{text}'. Write it as it is "
            "read, or give the phrase a region with a text of its own."
        )
    return found.start(1) - (len(prompt) - len(prompt.lstrip()))
