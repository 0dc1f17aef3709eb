"""What commands print and where: one result on stdout in the form asked for, everything else on stderr."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any

import typer


class Format(str, Enum):
    """Forms of a result."""

    human = "human"
    json = "json"
    quiet = "quiet"


FormatOption = Annotated[
    Format, typer.Option("--format", help="For people, for programs, or only the bare result (and no progress bar).")
]
Advance = Callable[[int, int], None]
"""Called with (done, in all)."""


def note(text: str) -> None:
    """A line for people, on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def emit(form: Format, data: Mapping[str, Any], human: Callable[[], Any] = str, quiet: Iterable[str] = ()) -> None:
    """Print a result on stdout.

    Args:
        form: Which of the three follows.
        data: For json, one object.
        human: Makes the text or rich renderable for people.
        quiet: The bare lines.
    """
    if form is Format.json:
        sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    elif form is Format.quiet:
        sys.stdout.writelines(f"{line}\n" for line in quiet)
    else:
        shown = human()
        if isinstance(shown, str):
            sys.stdout.write(shown.rstrip("\n") + "\n")
        else:
            from rich.console import Console

            Console().print(shown)
    sys.stdout.flush()


def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    """A library's warning as one line on stderr; those meant for developers are left out."""
    if not issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
        note(f"warning: {message}")


def hush() -> None:
    """Silence the progress bars and the log lines below errors of diffusers and transformers, for this process."""
    import diffusers
    import transformers

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def progress_bar(label: str, form: Format) -> Iterator[Advance]:
    """A bar on stderr while the block runs; nothing with --format quiet or when stderr is no terminal."""
    if form is Format.quiet or not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance
