"""DDIM (Song et al., arXiv 2010.02502) between any two noise levels, in either direction, for noise and v predictions.

z = a x + s e with a = sqrt(kept), s = sqrt(1 - kept), kept = alphas_cumprod. A step reads a prediction with the label
of its noisier end, splits the latents into picture x and noise e, and joins them at the other level. Inversion
therefore undoes a sampling step exactly when both read the same prediction, at zero terminal signal (kept = 0) too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import sqrt
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from ..errors import ScheduleError, UnsupportedModelError

__all__ = ["PREDICTIONS", "Level", "Predict", "ddim_step", "walk_ddim"]

Predict = Callable[[Tensor, int], Tensor]
"""(latents, timestep) -> the model's prediction, of the same shape."""


class Level(NamedTuple):
    """A noise level: the timestep that names it to the model, and the share of the picture's variance kept there.

    The clean end has no timestep of its own (-1); it is never read as a label.
    """

    timestep: int
    kept: float

    @property
    def sigma(self) -> float:
        """sqrt((1 - kept) / kept), as in `attnctrl.schedule`; infinite at zero terminal signal."""
        return sqrt((1 - self.kept) / self.kept) if self.kept > 0 else float("inf")


PREDICTIONS: Mapping[str, Callable[[float, float], tuple[float, float]]] = MappingProxyType(
    {"epsilon": lambda _a, _s: (0.0, 1.0), "v_prediction": lambda a, s: (-s, a)}
)
"""The weights of x and e in what a model predicts at the level (a, s)."""


def ddim_step(predict: Predict, z: Tensor, at: Level, to: Level, kind: str) -> Tensor:
    """The latents at level `to` of those at level `at`.

    Raises:
        UnsupportedModelError: `kind` is none of `PREDICTIONS`.
        ScheduleError: the prediction does not tell picture and noise apart: noise prediction at zero terminal signal,
            or one step of inversion from the clean picture to it.
    """
    if kind not in PREDICTIONS:
        raise UnsupportedModelError(
            f"DDIM reads predictions of {' or '.join(PREDICTIONS)}; the scheduler's prediction_type is '{kind}'."
        )
    label = min(at, to, key=lambda level: level.kept)
    of_picture, of_noise = PREDICTIONS[kind](*_parts(label))
    a, s = _parts(at)
    split = a * of_noise - s * of_picture
    if abs(split) < 1e-12:
        raise ScheduleError(
            f"A DDIM step from {at.kept:.3g} to {to.kept:.3g} of the signal cannot tell picture and noise apart by a "
            f"prediction of {kind}; take more steps, or a v-predicting model where the run begins without signal."
        )
    predicted = predict(z, label.timestep)
    picture = (of_noise * z - s * predicted) / split
    noise = (a * predicted - of_picture * z) / split
    a, s = _parts(to)
    return a * picture + s * noise


def walk_ddim(predict: Predict, z: Tensor, levels: Sequence[Level], kind: str) -> Iterator[Tensor]:
    """The latents at each of `levels`, the given ones first; falling `kept` inverts, rising samples.

    Args:
        predict: of the model.
        z: latents at levels[0].
        levels: those of generation (noisiest first), or the same reversed.
        kind: "epsilon" or "v_prediction".

    Raises:
        ScheduleError: levels neither rise nor fall throughout; and as `ddim_step`.
    """
    kept = [level.kept for level in levels]
    if len(kept) < 2 or kept != sorted(set(kept), reverse=kept[0] > kept[-1]):
        raise ScheduleError(
            f"DDIM needs two or more levels that rise or fall throughout; found {len(kept)} from {kept[:1]} to "
            f"{kept[-1:]}; take fewer steps, so that no timestep repeats."
        )
    return _walk(predict, z, levels, kind)


def _walk(predict: Predict, z: Tensor, levels: Sequence[Level], kind: str) -> Iterator[Tensor]:
    yield z
    for at, to in pairwise(levels):
        z = ddim_step(predict, z, at, to, kind)
        yield z


def _parts(level: Level) -> tuple[float, float]:
    return sqrt(level.kept), sqrt(1 - level.kept)
