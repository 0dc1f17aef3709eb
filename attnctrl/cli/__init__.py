"""The command line: parses, calls the library, prints. Data goes to stdout; progress, hints and errors to stderr.

Exit codes: 0 done, 1 failed, 2 asked wrongly (a bad option or scene), 130 interrupted. Commands import the library when
they run, so that `attnctrl --help` answers at once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from attnctrl.cli import (
    bench,
    check,
    demo,
    edit,
    env,
    evaluate,
    explain,
    generate,
    heads,
    invert,
    layout,
    maps,
    models,
    replay,
    style,
    subjects,
)
from attnctrl.cli.output import note, show_warning

FAILED, ASKED_WRONGLY, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="attnctrl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("layout")(layout.layout)
app.command("style")(style.style)
app.command("subjects")(subjects.subjects)
app.command("info")(replay.info)
app.command("replay")(replay.replay)
app.command("invert")(invert.invert)
app.command("edit")(edit.edit)
app.command("check")(check.check)
app.command("explain")(explain.explain)
app.command("models")(models.models)
app.command("demo")(demo.demo)
app.command("maps")(maps.maps)
app.command("eval")(evaluate.evaluate)
app.add_typer(heads.app, name="heads")
app.add_typer(bench.app, name="bench")
app.command("env")(env.env)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(metadata.version("attnctrl"))
        raise typer.Exit


@app.callback()
def attnctrl(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere on the line).")
    ] = False,
) -> None:
    """Training-free attention control for Diffusers: put things where you want them.

    Start with: [bold]attnctrl demo[/bold], then [bold]attnctrl generate scene.yaml[/bold]
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Errors become one message on stderr unless --debug is given."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning  # type: ignore[assignment]
            app(args=words, prog_name="attnctrl")
    except SystemExit as finished:
        if finished.code == INTERRUPTED:
            note("interrupted; no unfinished file was left")
        return finished.code if isinstance(finished.code, int) else FAILED
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    return 0


def _explain(error: Exception) -> int:
    from attnctrl import errors

    asked_wrongly = (
        errors.SceneError, errors.ControlError, errors.LayoutError, errors.SelectionError, errors.ScheduleError,
    )  # fmt: skip
    if isinstance(error, errors.AttnCtrlError):
        note(f"error: {error}")
        return ASKED_WRONGLY if isinstance(error, asked_wrongly) else FAILED
    if isinstance(error, OSError):
        note(f"error: {error}")
    else:
        note(f"error: {type(error).__name__}: {error}\n(not an error attnctrl foresaw: add --debug for the traceback)")
    return FAILED
