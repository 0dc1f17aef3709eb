"""Words of a prompt are found where the denoiser reads them, by what changes in the embeddings when a word changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import tiny_masked_pipes
import tiny_mmdit_pipes
import tiny_pipes
import torch
from diffusers import SanaPipeline
from test_video_pipelines import made
from torch import Tensor

import attnctrl as ac
from attnctrl.toybox.models.flux import tiny_pipeline

PROMPT = "a red circle left, a blue square right"
DEVICE = {"device": torch.device("cpu")}


def sana() -> Any:
    pipe, _ = made("sana")
    # as long as real ones; the instruction is spelled out letter by letter
    pipe.tokenizer.model_max_length = 10**30
    return pipe


def told(pipe: Any, prompt: str, **options: Any) -> Tensor:
    """As the pipeline's call encodes a prompt, at its own length."""
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, **DEVICE, **options)[0]


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
    "flux2 dev": (tiny_mmdit_pipes.flux2_dev, lambda pipe, p: pipe.encode_prompt(p, **DEVICE)[0]),
    "flux2 dev, padded on the left": (
        lambda: tiny_mmdit_pipes.flux2_dev(padding_side="left"),
        lambda pipe, p: pipe.encode_prompt(p, **DEVICE)[0],
    ),
    "auraflow": (tiny_mmdit_pipes.auraflow, told),
    "cogview4": (tiny_mmdit_pipes.cogview4, told),
    "lumina2": (tiny_masked_pipes.lumina2, told),
    "hunyuan-image": (tiny_masked_pipes.hunyuan_image, lambda pipe, p: pipe.encode_prompt(p, **DEVICE)[0]),
    "pixart": (lambda: made("pixart")[0], lambda pipe, p: told(pipe, p, clean_caption=True)),
    "sana": (sana, lambda pipe, p: told(pipe, p, complex_human_instruction=INSTRUCTION)),
}
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
MIXING = ("out_proj", "o_proj", "SelfAttention.o")


@torch.no_grad()
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


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [None, 40])
def test_nothing_before_a_phrase_knows_of_it(side: str, length: int | None) -> None:
    """The text model of FLUX.2 dev is causal: with its mixing on, a word reaches itself and what follows."""
    pipe = tiny_mmdit_pipes.flux2_dev(padding_side=side)
    given = {} if length is None else {"max_sequence_length": length}
    ((start, stop),) = ac.phrase_spans(pipe, PROMPT, "blue square", **given)
    with torch.no_grad():
        before, after = (
            pipe.encode_prompt(p, **DEVICE, **given)[0] for p in (PROMPT, PROMPT.replace("blue square", "green star"))
        )
    difference = changed(before, after)
    assert min(difference) == start
    assert set(range(start, stop)) <= difference
    # "right" and the pieces of the vocabulary around it follow; padding comes before them where it is on the left
    assert (start > 20) == (side == "left")
    if side == "left":
        assert max(difference) == (length or 512) - 1


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


@pytest.mark.parametrize("name", ["flux2", "flux2 dev", "qwen", "zimage", "sd3"])
def test_the_length_that_the_call_is_given_cuts_words_off(name: str) -> None:
    """The last word stands last but for a template's end or an end token; head tokens that are dropped do not count."""
    pipe = PIPES[name][0]()
    *_, (_, stop) = ac.phrase_spans(pipe, PROMPT, "right")
    length = stop - (pipe.tokenizer_max_length if name == "sd3" else 0)
    spans = ac.phrase_spans(pipe, PROMPT, "right", max_sequence_length=length + 1)
    assert spans[-1] == (stop - 1, stop)
    with pytest.raises(ac.LayoutError, match="'right' are cut off"):
        ac.phrase_spans(pipe, PROMPT, "right", max_sequence_length=length - 1)


def test_prompts_that_are_rewritten() -> None:
    """In another case or without spaces around them they are found; without some of their words they are not."""
    pipe = sana()
    expected = ac.phrase_spans(pipe, PROMPT, "red circle")
    assert ac.phrase_spans(pipe, f"  {PROMPT.upper()} ", "red circle") == expected
    with pytest.raises(ac.LayoutError, match=r"is rewritten before tokenizer is given it, as '.*a red circle"):
        ac.phrase_spans(tiny_mmdit_pipes.flux2_dev(), "a red[IMG] circle", "circle")


def test_a_call_that_does_not_tell_its_length_is_refused() -> None:
    class Plain(type(tiny_mmdit_pipes.chroma())):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    pipe = tiny_mmdit_pipes.chroma()
    expected = ac.phrase_spans(pipe, PROMPT, "square")
    pipe.__class__ = Plain
    with pytest.raises(ac.UnsupportedModelError, match="The call of Plain has no max_sequence_length"):
        ac.phrase_spans(pipe, PROMPT, "square")
    assert ac.phrase_spans(pipe, PROMPT, "square", max_sequence_length=40) == expected


def test_pipelines_that_do_not_tell_places_are_refused() -> None:
    with pytest.raises(ac.UnsupportedModelError, match="not known for LTXPipeline"):
        ac.phrase_spans(made("ltx")[0], PROMPT, "square")
    pipe = tiny_mmdit_pipes.zimage()
    pipe.tokenizer.padding_side = "left"
    with pytest.raises(ac.UnsupportedModelError, match="padding_side='right'"):
        ac.phrase_spans(pipe, PROMPT, "square")
    pipe = PIPES["sd"][0]()
    pipe.maybe_convert_prompt = lambda prompt, tokenizer: prompt + " <cat> <cat_1>"
    with pytest.raises(ac.UnsupportedModelError, match="textual inversion"):
        ac.phrase_spans(pipe, PROMPT, "square")


def test_texts_of_regions_are_bound_to_the_words_of_the_prompt() -> None:
    pipe, prompt = tiny_pipeline(), "a red circle, a blue square, a red circle"
    left, right, square = (ac.Region("a red circle", box=(0, 0, 0.3, 1)), ac.Region("a red circle", name="twin"),
                           ac.Region("a blue square", strength=0.5))  # fmt: skip

    def spans(regions: list[ac.Region], how: Any = "joint") -> list[Any]:
        return [one.spans for one in ac.in_prompt(pipe, prompt, regions, how, max_sequence_length=24)]

    # tokens: a red circle , a blue square , a red circle
    assert spans([left, square]) == [((0, 3), (8, 11)), ((4, 7),)]
    assert spans([left, square, right]) == [((0, 3),), ((4, 7),), ((8, 11),)]
    assert spans([left], "separate") == [()]
    given = ac.Region("a red circle", spans=((1, 2),))
    assert spans([given, ac.Region()]) == [((1, 2),), ()]
    bound = ac.in_prompt(pipe, prompt, [square], max_sequence_length=24)[0]
    assert (bound.strength, bound.prompt) == (0.5, "a blue square")


def test_what_the_prompt_does_not_hold_stays_a_text_of_its_own_or_is_refused() -> None:
    pipe, prompt = tiny_pipeline(), "a red circle, a blue square"
    lake, part, whole = ac.Region("a lake"), ac.Region("red circle"), ac.Region("a red circle")
    told = ac.in_prompt(pipe, prompt, [lake, whole, part], "auto", max_sequence_length=24)
    # "red circle" is held by the words of the region before
    assert [one.spans for one in told] == [(), ((0, 3),), ()]
    with pytest.raises(ac.LayoutError, match="'a lake' is not in the prompt"):
        ac.in_prompt(pipe, prompt, [lake], max_sequence_length=24)
    twice = [whole, ac.Region("a red circle", name="twin")]
    with pytest.raises(ac.LayoutError, match="occurs 1 time"):
        ac.in_prompt(pipe, prompt, twice, max_sequence_length=24)
    assert [one.spans for one in ac.in_prompt(pipe, prompt, twice, "auto", max_sequence_length=24)] == [((0, 3),), ()]


def test_where_words_stand_is_not_known_in_pipelines_of_editing() -> None:
    """Their language model reads pictures between the words."""
    pipe = tiny_mmdit_pipes.qwen()
    pipe.processor = object()
    with pytest.raises(ac.UnsupportedModelError, match="reads pictures together with the prompt"):
        ac.in_prompt(pipe, PROMPT, [ac.Region("a red circle")])
    assert ac.in_prompt(pipe, PROMPT, [ac.Region("a red circle")], "auto")[0].spans == ()
