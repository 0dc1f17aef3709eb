"""Pictures that share, and ask as they would alone: queries of a plain forward for the first steps.

After the query blending of ConsiStory (arXiv 2402.03286, "Layout diversity"): what is read of others pulls layouts
together, and queries decide the layout in the first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from ..call import Situation
from ..content import Places, States
from ..errors import ControlError, PlanError, ScheduleError
from ..execute import Kernel
from ..perturb import blend
from ..schedule import Moment, Window, active_steps
from ..select import Layer
from ..watch import View
from .base import Branch, Control
from .keep import is_kept_layer

__all__ = ["Blended", "PlainQueries"]

Kept = dict[str, Tensor]
"""By layer, the queries [B, heads, tokens, head_dim] of all rows of a forward, as the kernel got them."""


@dataclass(frozen=True, eq=False)
class PlainQueries(Control):
    """Image tokens ask others with queries that are in part those of a forward in which nothing is shared:

        q_i' = (1 - nu) q_i + nu q_i^plain    with    nu = s (first + (last - first) i / (n - 1))

    at the i-th of the n steps of its window, `strength` s, where image tokens read image tokens. It needs a `Share` in
    the same layers, and acts at the steps at which that one does. Each of these steps costs one more forward of the
    model, without all that reads other pictures; its queries are kept until the step's own forward has ended: of each
    layer as much as its queries take.

    Attributes:
        first, last: shares in [0, 1] of the plain queries at the first and the last step of the window.
    """

    name: ClassVar[str] = "plain_queries"
    follows: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True

    first: float = 0.9
    last: float = 0.818
    window: Window = field(default=(0.0, 0.12), kw_only=True)
    branch: Branch = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("first", 0, 1)
        self._check_range("last", 0, 1)

    @property
    def is_idle(self) -> bool:
        return super().is_idle or not (self.first or self.last)

    @cached_property
    def kept(self) -> Kept:
        """What the plain forward left for the one that follows."""
        return {}

    def share(self, moment: Moment) -> float:
        """nu at a moment inside the window.

        Raises:
            ScheduleError: when the step is unknown.
        """
        if self.first == self.last:
            return self.strength * self.first
        steps = active_steps(self.window, moment.sigmas)
        if moment.step not in steps:
            raise ScheduleError(
                f"'{self.name}' blends by step, and the step of this forward cannot be told. Attach to the pipeline, "
                "or pass scheduler=... after its set_timesteps."
            )
        way = steps.index(moment.step) / max(1, len(steps) - 1)
        return self.strength * (self.first + (self.last - self.first) * way)

    def probes(self, view: View) -> dict[str, Probed]:
        return {
            layer.name: Probed(self.kept, layer.name)
            for layer in view.layers
            if is_kept_layer(view.frames[0][layer.frame])
        }

    def forget(self) -> None:
        self.kept.clear()

    def content(self, situation: Situation, layer: Layer, places: Callable[[], Places | None]) -> Sequence[Blended]:
        if not is_kept_layer(situation.frame):
            return ()
        image = situation.frame.queries["image"]
        return (Blended(self, (image.start, image.stop)),)


@dataclass(frozen=True)
class Probed:
    """Keeps the queries of one layer in one forward, under its name."""

    kept: Kept
    layer: str

    def look(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kernel: Kernel, scale: float | None
    ) -> None:
        # of fused projections a view would keep keys and values as well
        self.kept[self.layer] = query.clone()


@dataclass(frozen=True)
class Blended:
    """The content of a layer's call under `PlainQueries`.

    Attributes:
        control: whose queries are kept.
        image: [start, stop) of the image tokens.
        layer, share: where a forward stands, and nu there; see `at`.
    """

    control: PlainQueries
    image: tuple[int, int]
    layer: str = ""
    share: float = 0.0

    def at(self, layer: str, moment: Moment) -> Blended:
        """The same for a layer of a forward. Raises `ControlError` when nothing was kept of it."""
        if layer not in self.control.kept:
            raise ControlError(
                f"'{self.control.name}': the plain forward of this step did not call the kernel of {layer}, so there "
                "are no queries of it. Leave this layer out of its `layers`."
            )
        return replace(self, layer=layer, share=self.control.share(moment))

    def __call__(self, own: States, batch: States, rows: Tensor) -> States:
        plain, (start, stop) = self.control.kept[self.layer], self.image
        if plain.shape != batch.query.shape:
            raise PlanError(
                f"The plain forward had queries {tuple(plain.shape)} in {self.layer}, and this one has "
                f"{tuple(batch.query.shape)}: another hook splits the batch or changes the sequence."
            )
        mixed = blend(own.query[:, :, start:stop], plain[rows, :, start:stop], self.share)
        return own._replace(query=own.query.slice_scatter(mixed, 2, start, stop))

    def explain(self) -> str:
        """How much of them."""
        return f"{self.share:.3g} of the queries are those of a plain forward"
