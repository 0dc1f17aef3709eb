"""Inversion of real pictures: solvers that walk between a picture and noise, and the trajectory they leave.

The solvers know tensors only: a function of (latents, noise level) and a list of levels. One list serves both
directions, the one that generation uses, reversed to invert. `attnctrl.pipelines.inversion` binds them to pipelines.

*_, noise = walk(velocity, picture, sigmas[::-1], FLOW_STEPS["midpoint"])
*_, again = walk(velocity, noise, sigmas, FLOW_STEPS["midpoint"])

The records of editing (values per interval, stage and layer) are to be keyed by what `evaluations` lists.
"""

from .ddim import Level, walk_ddim
from .flow import FLOW_STEPS, Evaluation, evaluations, fading, pulled, walk
from .noised import Map, diffusion_shares, flow_shares, noised, odds_map
from .trajectory import Trajectory

__all__ = [
    "FLOW_STEPS",
    "Evaluation",
    "Level",
    "Map",
    "Trajectory",
    "diffusion_shares",
    "evaluations",
    "fading",
    "flow_shares",
    "noised",
    "odds_map",
    "pulled",
    "walk",
    "walk_ddim",
]
