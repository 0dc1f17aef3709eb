"""`attnctrl style`: pictures in one style, without a scene file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from attnctrl.cli.groups import NegativePrompt, Sampling, Seed, Size, folder, preset_like, with_groups
from attnctrl.cli.invert import read_picture
from attnctrl.cli.loading import Loading, QuickModel, check_preset, load, named_model
from attnctrl.cli.output import Format, FormatOption, emit, hush, progress_bar


@with_groups
def style(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What each picture shows; the first one gives the style.")
    ],
    style: Annotated[
        str, typer.Option("--style", "-s", help='Words that all have in common: "in ink", or "an etching of {}".')
    ] = "",
    picture: Annotated[
        Path | None, typer.Option("--picture", "-p", help="A real picture that gives the style instead.")
    ] = None,
    picture_prompt: Annotated[str, typer.Option("--picture-prompt", help="What that picture shows.")] = "",
    cleaner: Annotated[
        float, typer.Option("--cleaner", min=0, max=5, help="How much less noisy than the run that picture is.")
    ] = 0.0,
    negative_prompt: NegativePrompt = "",
    preset: Annotated[str | None, preset_like("style-aligned")] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=2, help="So many pictures at once, the first in each; else all.")
    ] = None,
    output: Annotated[Path, folder("style-0.png, ...")] = Path("out"),
    seed: Seed = None,
    form: FormatOption = Format.human,
    model: QuickModel = "toy-flux",
    loading: Loading = Loading(),
    size: Size = Size(),
    sampling: Sampling = Sampling(),
) -> None:
    """Draw pictures in one style, that of the first or that of a real picture. Each PNG carries what replay needs.

    Examples:

      attnctrl style "a red circle" "a blue star" "a green heart" --style "white background"

      attnctrl style "a red circle" "a blue star" --picture poster.png --picture-prompt "a green heart"
    """
    from attnctrl.pipelines.style import StylePipeline, told_prompts

    told_prompts(prompts, style, picture is None)
    check_preset(preset)
    if picture is None and (picture_prompt or cleaner):
        raise typer.BadParameter("--picture-prompt and --cleaner are of a picture; give --picture with them.")
    if picture is not None and not picture_prompt.strip():
        raise typer.BadParameter(
            "the model reads what the picture shows; say it, such as 'a poster'.", param_hint="--picture-prompt"
        )
    image = None if picture is None else read_picture(picture, "--picture")
    found, setup = named_model(model), loading.setup()
    hush()
    pipe = load(found, loading, StylePipeline, setup=setup)
    started = time.perf_counter()
    asked = {"picture": image, "picture_prompt": picture_prompt, "cleaner": cleaner} if picture is not None else {}
    with progress_bar("style", form) as advance:
        drawn = pipe(
            prompts,
            style,
            negative_prompt,
            preset=preset,
            batch=batch,
            seeds=seed or 0,
            progress=advance,
            **asked,
            **vars(size),
            **sampling.arguments(),
        )
    seconds = round(time.perf_counter() - started, 3)
    paths = [str(output / f"style-{number}.png") for number in range(len(drawn))]
    for path, one in zip(paths, drawn, strict=True):
        one.save(path)
    told = {
        "command": "style",
        "images": [
            {"path": path, "prompt": one.record["scene"]["prompt"], "seed": one.seed, "controlled": one.controlled}
            for path, one in zip(paths, drawn, strict=True)
        ],
        "model": pipe.identity,
        "seconds": seconds,
    }
    emit(form, told, lambda: "\n".join([*paths, f"{len(paths)} pictures, {seconds:.1f} s"]), paths)
