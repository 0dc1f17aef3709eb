"""`attnctrl layout`: subjects in places of their own, without a scene file."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnctrl.cli.generate import tell
from attnctrl.cli.groups import NegativePrompt, Num, Sampling, Seed, Size, folder, preset_like, with_groups
from attnctrl.cli.loading import Loading, QuickModel, check_preset, load, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar

if TYPE_CHECKING:
    from attnctrl.pipelines import Subject

NONE = "-"
_NUMBER = r"\s*-?(?:\d+\.?\d*|\.\d+)\s*"
_NUMBERS = re.compile(rf"{_NUMBER}(?:,{_NUMBER})*")


@with_groups
def layout(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The whole picture, in words.")],
    subject: Annotated[
        list[str] | None,
        typer.Option("--subject", "-s", help="Something in it, in words; once for each. Left out: the prompt itself."),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            "-a",
            metavar="X0,Y0,X1,Y1|MASK|-",
            help="Its place: a box in shares of width and height, a picture of a mask, or - for what the others leave; "
            "one for each subject, in the same order.",
        ),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            "-r",
            metavar="IMAGE|-",
            help="What it looks like, - for any; one for each subject, in the same order.",
        ),
    ] = None,
    background: Annotated[str | None, typer.Option("--background", help="What is outside all places.")] = None,
    negative_prompt: NegativePrompt = "",
    preset: Annotated[str | None, preset_like("lamic-fixed")] = None,
    output: Annotated[Path, folder("layout-SEED.png")] = Path("out"),
    seed: Seed = None,
    num: Num = 1,
    form: FormatOption = Format.human,
    model: QuickModel = "toy-flux",
    loading: Loading = Loading(),
    size: Size = Size(),
    sampling: Sampling = Sampling(),
) -> None:
    """Draw subjects in their places. Each PNG carries its layout as a scene: replay and generate take it.

    Examples:

      attnctrl layout "a red circle" --at 0.05,0.2,0.45,0.8

      attnctrl layout "a red circle left, a blue square right" -s "a red circle left" -a 0,0.2,0.45,0.8 -s "a blue square right" -a 0.55,0.2,1,0.8
    """  # noqa: E501
    from attnctrl.pipelines.layout import LayoutPipeline, scene_of

    subjects = _subjects(prompt, subject or [], at or [], reference or [])
    check_preset(preset)
    told: dict[str, Any] = {**vars(size), "background": background, "negative_prompt": negative_prompt}
    # wrong places and files are found before a model is loaded
    scene_of({**told, **sampling.changes(), "prompt": prompt, "version": 1}, subjects, "layout")
    found, setup, first = named_model(model), loading.setup(), seed or 0
    hush()
    pipe = load(found, loading, LayoutPipeline, setup=setup)
    asked = {**told, **sampling.arguments(), "preset": preset}
    images: list[dict[str, Any]] = []
    with progress_bar("layout", form) as advance:
        for number in range(num):
            started = time.perf_counter()
            # by itself: rounding depends on the batch, and replay draws it by itself
            (picture,) = pipe(
                prompt,
                subjects,
                seeds=first + number,
                progress=lambda done, total, before=number: advance(before * total + done, num * total),
                **asked,
            )
            path = output / f"layout-{picture.seed}.png"
            picture.save(path)
            took = round(time.perf_counter() - started, 3)
            images.append(
                {"path": str(path), "seed": picture.seed, "size": list(picture.image.size), "seconds": took,
                 "controlled": picture.controlled, "model": picture.record["model"]}
            )  # fmt: skip
            tell(images[-1], form)
    if form is Format.json:
        emit(form, {"command": "layout", "images": images})


def _subjects(prompt: str, texts: list[str], places: list[str], references: list[str]) -> list[Subject]:
    """The subjects of the options, which are paired by their order. Raises `typer.BadParameter`."""
    from attnctrl.pipelines import Subject

    named = texts or [prompt]
    for option, values in (("--at", places), ("--reference", references)):
        if (values or option == "--at") and len(values) != len(named):
            whose = f"{len(named)} subjects ({', '.join(named)})" if texts else "the prompt alone, as no --subject says"
            raise typer.BadParameter(
                f"found {len(values)} for {whose}; give one {option} for each --subject, in the same order, or {NONE} "
                "for none.",
                param_hint=option,
            )
    return [
        Subject(text, reference=_picture(reference), **_place(place))
        for text, place, reference in zip(named, places, references or [NONE] * len(named), strict=True)
    ]


def _place(text: str) -> dict[str, Any]:
    """A box, a mask or nothing, as `Subject` takes it. Raises `typer.BadParameter`."""
    if text == NONE:
        return {}
    if _NUMBERS.fullmatch(text):
        numbers = tuple(map(float, text.split(",")))
        if len(numbers) != 4:
            raise typer.BadParameter(
                f"'{text}' has {len(numbers)} numbers; a box has four: left,top,right,bottom as shares of width and "
                "height, such as 0.05,0.2,0.45,0.8.",
                param_hint="--at",
            )
        return {"box": numbers}
    if not Path(text).is_file():
        raise typer.BadParameter(
            f"'{text}' is neither a box (such as 0.05,0.2,0.45,0.8) nor the file of a mask.", param_hint="--at"
        )
    return {"mask": text}


def _picture(text: str) -> str | None:
    if text == NONE:
        return None
    if not Path(text).is_file():
        raise typer.BadParameter(f"no picture '{text}'; name a file, or {NONE} for none.", param_hint="--reference")
    return text
