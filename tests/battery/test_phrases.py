"""Words of a prompt are found where the denoiser reads them, by what changes in the embeddings when a word changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_mmdit_pipes
import tiny_pipes
import torch
from torch import Tensor

import attnctrl as ac
from attnctrl.toybox.models.flux import tiny_pipeline

PROMPT = "a red circle left, a blue square right"
DEVICE = {"device": torch.device("cpu")}
PIPES: dict[str, tuple[Callable[[], Any], Callable[[Any, str], Any]]] = {
    "flux": (tiny_pipeline, lambda pipe, p: pipe.encode_prompt(p, None, max_sequence_length=24)[0]),
    "chroma": (tiny_mmdit_pipes.chroma, lambda pipe, p: pipe.encode_prompt(p, None, max_sequence_length=24)[0]),
    "sd": (tiny_pipes.sd, lambda pipe, p: pipe.encode_prompt(p, DEVICE["device"], 1, False)[0]),
    "sd3": (tiny_pipes.sd3, lambda pipe, p: pipe.encode_prompt(p, None, None, max_sequence_length=24)[0]),
    "sd3 without T5": (
        lambda: tiny_pipes.sd3(with_t5=False),
        lambda pipe, p: pipe.encode_prompt(p, None, None, max_sequence_length=24)[0],
    ),
    "qwen": (tiny_mmdit_pipes.qwen, lambda pipe, p: pipe.encode_prompt(p, **DEVICE)[0]),
    "zimage": (
        tiny_mmdit_pipes.zimage,
        lambda pipe, p: pipe.encode_prompt(p, do_classifier_free_guidance=False, **DEVICE)[0][0][None],
    ),
    "flux2": (tiny_mmdit_pipes.flux2, lambda pipe, p: pipe.encode_prompt(p, max_sequence_length=32, **DEVICE)[0]),
}
MIXING = ("out_proj", "o_proj", "SelfAttention.o")


def without_mixing(pipe: Any) -> Any:
    """Text encoders whose attention adds nothing: every embedding depends on its own token alone."""
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(pipe, name, None)
        for part, module in encoder.named_modules() if encoder is not None else ():
            if part.endswith(MIXING):
                for parameter in module.parameters():
                    parameter.zero_()
    return pipe


def changed(before: Tensor, after: Tensor) -> set[int]:
    return set((before[0] != after[0]).any(-1).nonzero().flatten().tolist())


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize(("phrase", "other"), [("red circle", "green star"), ("square", "heart"), ("a", "the")])
def test_a_phrase_is_where_its_embeddings_are(name: str, phrase: str, other: str) -> None:
    make, encode = PIPES[name]
    pipe = without_mixing(make())
    spans = ac.phrase_spans(pipe, PROMPT, phrase)
    replaced = PROMPT.replace(f"{phrase} ", f"{other} ")
    if phrase == "a":  # is no word of the vocabulary in another spelling: only its places are known
        replaced = "thing red circle left, thing blue square right"
    with torch.no_grad():
        difference = changed(encode(pipe, PROMPT), encode(pipe, replaced))
    assert {n for start, stop in spans for n in range(start, stop)} == difference
    assert len(difference) == (2 if phrase != "square" else 1) * (1 + (name == "sd3"))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_an_occurrence_can_be_asked_for(name: str) -> None:
    pipe = PIPES[name][0]()
    both = ac.phrase_spans(pipe, PROMPT, "a")
    assert len(both) == 2
    assert [ac.phrase_spans(pipe, PROMPT, "a", occurrence=n) for n in (0, 1)] == [(both[0],), (both[1],)]
    # neighbours are one span
    assert len(ac.phrase_spans(pipe, "red red circle", "red")) == 1


def test_phrases_are_whole_words_and_case_is_a_second_choice() -> None:
    pipe = PIPES["sd"][0]()
    with pytest.raises(ac.LayoutError, match=r"The phrase 'circ' is not in the prompt .* Give whole words"):
        ac.phrase_spans(pipe, PROMPT, "circ")
    with pytest.raises(ac.LayoutError, match="is not in the prompt"):
        ac.phrase_spans(pipe, PROMPT, " ")
    with pytest.raises(ac.LayoutError, match=r"occurs 1 time\(s\) .* occurrence 1"):
        ac.phrase_spans(pipe, PROMPT, "circle", occurrence=1)
    assert ac.phrase_spans(pipe, PROMPT, "Red Circle") == ac.phrase_spans(pipe, PROMPT, "red circle")
    assert len(ac.phrase_spans(pipe, "Red circle, red square", "red")) == 1


def test_words_behind_the_encoders_limit_are_an_error() -> None:
    pipe = PIPES["sd"][0]()
    with pytest.raises(ac.LayoutError, match="'blue square' are cut off: tokenizer keeps 40 tokens"):
        ac.phrase_spans(pipe, "a red circle, " * 12 + "a blue square", "blue square")


def test_pipelines_that_do_not_tell_places_are_refused() -> None:
    with pytest.raises(ac.UnsupportedModelError, match=r"FLUX\.2 dev"):
        ac.phrase_spans(tiny_mmdit_pipes.flux2_dev(), PROMPT, "square")
    with pytest.raises(ac.UnsupportedModelError, match="not known for AuraFlowPipeline"):
        ac.phrase_spans(tiny_mmdit_pipes.auraflow(), PROMPT, "square")
    pipe = tiny_mmdit_pipes.zimage()
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ac.UnsupportedModelError, match="padding_side='right'"):
        ac.phrase_spans(pipe, PROMPT, "square")
    pipe = PIPES["sd"][0]()
    pipe.maybe_convert_prompt = lambda prompt, tokenizer: prompt + " <cat> <cat_1>"
    with pytest.raises(ac.UnsupportedModelError, match="textual inversion"):
        ac.phrase_spans(pipe, PROMPT, "square")
