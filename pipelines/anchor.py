"""A real picture as the anchor of a set: a row of every batch shows it at every noise level, and nobody draws it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnctrl.pipelines.base import canvas_of

from attnctrl.errors import ControlError

if TYPE_CHECKING:
    from PIL import Image

    from attnctrl.pinned import Pins

__all__ = ["Anchor"]

_FILE = "anchor.png"
_CLEANEST = 5.0


@dataclass(frozen=True, eq=False)
class Anchor:
    """What the first row of each batch shows.

    Attributes:
        image: RGB, of the size that is drawn.
        cleaner: mu of `attnctrl.inversion.odds_map`: the odds of its noise are e^(-2 mu) those of the run.
    """

    image: Image.Image
    cleaner: float = 0.0

    @classmethod
    def read(cls, picture: Any, size: tuple[int, int], pipe: Any, cleaner: float) -> Anchor:
        """The middle of a picture in the proportions of what is drawn, at its size.

        Args:
            picture: PIL picture or path.
            size: (width, height) in pixels.
            pipe: that draws.
            cleaner: see above, 0 to 5.

        Raises:
            AssetError: the picture cannot be read, or has too many pixels to be decoded.
            LayoutError: it is narrower than a token, or longer than 4096 pixels.
            ControlError: cleaner is out of range.
        """
        from attnctrl.pipelines.references import load_reference, reference_size
        from PIL import Image, ImageOps

        if not 0 <= cleaner <= _CLEANEST:
            raise ControlError(f"cleaner must be in [0, {_CLEANEST:g}], 0 as noisy as the run; found {cleaner}.")
        read = load_reference(picture, "picture")
        reference_size(read.size, canvas_of(pipe).multiple, label="picture")
        return cls(ImageOps.fit(read, size, Image.Resampling.LANCZOS), cleaner)

    @classmethod
    def recorded(cls, told: Mapping[str, Any], files: Mapping[str, bytes]) -> Anchor:
        """The anchor of a record. Raises `ControlError` where its picture is not among the files."""
        from attnctrl.scenefile import decode_picture

        if told["file"] not in files:
            raise ControlError(
                f"The style of this set is a picture ('{told['file']}'), which stands beside the record and not in it. "
                "Give files=: attnctrl.provenance.carried(path) of the PNG, or `files` of the picture."
            )
        return cls(decode_picture(files[told["file"]]), float(told["cleaner"]))

    def record(self) -> dict[str, Any]:
        """What records say of it."""
        return {"file": _FILE, "cleaner": self.cleaner}

    def files(self) -> dict[str, bytes]:
        """The picture as a PNG, by the name that records give it."""
        data = io.BytesIO()
        self.image.save(data, "PNG")
        return {_FILE: data.getvalue()}

    def held(self, pipe: Any, seed: int) -> AbstractContextManager[Pins]:
        """While this lasts the first row of a pipeline's batches shows it, under noise of this seed.

        Raises:
            UnsupportedModelError: the pipeline's pictures cannot be pinned.
        """
        from attnctrl.pipelines.canvas import pinned_pictures

        from attnctrl.inversion import odds_map

        return pinned_pictures(pipe, {0: self.image}, {0: seed}, cleaner=odds_map(self.cleaner))
