"""The toy models, made from the real Diffusers classes: a recipe each."""

from __future__ import annotations

from . import flux, sd, sd3
from .base import Conditions, Noise, Recipe

RECIPES: dict[str, Recipe] = {one.name: one for one in (flux.RECIPE, sd.RECIPE, sd3.RECIPE)}

__all__ = ["RECIPES", "Conditions", "Noise", "Recipe"]
