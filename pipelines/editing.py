"""A picture drawn again with another prompt: what it came from is found, and its values are held on to for a while.

editor = Editor.from_pipe(pipe)
edit = editor.edit("photo.png", EditSettings("a blue square", source="a red circle", steps=25))
edit.save("edited.png")

RF-Edit (Wang et al., arXiv 2411.04746): the picture is inverted with its own prompt while `Keep` captures values of the
last blocks; generation from the noise that was found reads them with `Inject` in its first steps. DDIM on UNets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.base import Progress
from attnctrl.pipelines.inversion import InversionSettings, Inverter, Method
from attnctrl.pipelines.latents import read_pictures

from attnctrl import files, provenance
from attnctrl.attach import attach
from attnctrl.bank import Bank
from attnctrl.controls import Control, Inject, Keep
from attnctrl.controls.inject import Kind, Whose
from attnctrl.errors import ControlError
from attnctrl.inversion import Trajectory

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Edit", "EditSettings", "Editor"]


@dataclass(frozen=True)
class EditSettings:
    """How a picture is edited.

    Attributes:
        prompt: what it shall show.
        source: what it shows; "" lets the model speak for itself, as in the paper.
        negative_prompt: for guidance above 1.
        method, steps: as of `InversionSettings`.
        guidance: classifier-free guidance of the drawing; the inversion has none.
        distilled_guidance: what guidance-distilled models are told while they draw; 1 in the inversion.
        share: part of the steps, from the noisiest on, in which `states` are the picture's; 0 lets go of it.
        strength: how far, see `Inject`.
        states, tokens: what is the picture's, and of which tokens; see `Inject`.
        layers: in which; the preset "edit" names those of the model's family.
    """

    prompt: str
    source: str = ""
    negative_prompt: str = ""
    method: Method | None = None
    steps: int | None = None
    guidance: float = 2.0
    distilled_guidance: float = 2.0
    share: float = 0.3
    strength: float = 1.0
    states: Sequence[Kind] = ("value",)
    tokens: Whose = "image"
    layers: str | Sequence[str] | None = "edit"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ControlError(f"share must be in [0, 1]; found {self.share:g}.")
        for name in ("guidance", "distilled_guidance"):
            if getattr(self, name) < 1:
                raise ControlError(f"{name} must be 1 or more; found {getattr(self, name):g}.")
        # asked here, before anything is loaded
        self.inject(Bank())
        self.inverting()

    def inject(self, bank: Bank) -> Inject:
        """What acts while the picture is drawn."""
        return Inject(
            bank=bank,
            states=self.states,
            tokens=self.tokens,
            layers=self.layers,
            window=(0.0, self.share),
            strength=self.strength,
        )

    def keep(self, bank: Bank) -> Keep:
        """What captures while the picture is inverted."""
        return Keep(
            bank=bank,
            layers=self.layers,
            window=(0.0, self.share),
            queries="query" in self.states,
            texts=self.tokens == "all",
        )

    def inverting(self) -> InversionSettings:
        """How the picture is inverted."""
        return InversionSettings(self.source, method=self.method, steps=self.steps)

    def drawing(self) -> InversionSettings:
        """How it is drawn again."""
        return InversionSettings(
            self.prompt,
            self.negative_prompt,
            self.method,
            self.steps,
            self.guidance,
            self.distilled_guidance,
        )


@dataclass(frozen=True, eq=False)
class Edit:
    """Pictures that were edited.

    Attributes:
        images: one for each that was given.
        inverted: the path from them to noise.
        drawn: the path from there to what they became.
        record: what it takes to do it again, see `attnctrl.provenance`.
        report: what acted where, "" where nothing was held on to.
    """

    images: tuple[Image.Image, ...]
    inverted: Trajectory
    drawn: Trajectory
    record: dict[str, Any] = field(repr=False)
    report: str = ""

    def save(self, path: str | Path, number: int = 0) -> Path:
        """Write one of them as a PNG that carries the record; whole or not at all."""
        return files.write_png(path, self.images[number], provenance.to_text(self.record))


class Editor(Inverter):
    """A pipeline that edits pictures. It stays what it is; controls that are attached to it act as well."""

    def edit(
        self,
        pictures: Any,
        settings: EditSettings,
        *,
        bank: Bank | None = None,
        progress: Progress | None = None,
    ) -> Edit:
        """Pictures drawn again as `settings` say.

        Args:
            pictures: PIL pictures or paths, one or a list; of one size.
            settings: how.
            bank: an empty one for their states, where it matters how and on which device they are kept.
            progress: called after every step of either way.

        Raises:
            AssetError, LayoutError, ControlError, ScheduleError, UnsupportedModelError: as `invert`; and as `attach`.
        """
        read, kept = read_pictures(pictures), bank or Bank()
        inject = settings.inject(kept)
        inverting, drawing = self.completed(settings.inverting()), self.completed(settings.drawing())
        steps = int(inverting.steps or 0)

        def told(before: int) -> Progress | None:
            return None if progress is None else lambda done, _: progress(before + done, 2 * steps)

        held = () if inject.is_idle else (settings.keep(kept),)
        with self._with(held):
            inverted = self.invert(read, inverting, progress=told(0), arrive=bool(held))
        with self._with(() if inject.is_idle else (inject,)) as handle:
            drawn = self.generate(inverted, drawing, progress=told(steps))
            report = "" if handle is None else str(handle.report())
        record = {
            **self.stage(self.pipe),
            "edit": {"sha256": [hashlib.sha256(one.tobytes()).hexdigest() for one in read], "size": list(read[0].size)},
            "settings": {**asdict(settings), "method": drawing.method, "steps": steps},
        }
        return Edit(tuple(self.pictures(drawn)), inverted, drawn, record, report)

    def _with(self, controls: Sequence[Control]) -> AbstractContextManager[Any]:
        return attach(self.pipe, controls) if controls else nullcontext()
