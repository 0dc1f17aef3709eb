"""Reading attention: maps of what image tokens attend to, masks from them, pictures of them.

    from attnctrl import maps
    with ac.attach(pipe, [...]), maps.record(pipe, {"cat": "a cat"}, prompt="a cat in a park") as found:
        pipe("a cat in a park")
    mask, undecided = maps.otsu(found["cat"])

Nothing here makes a map of tokens x tokens: the kernel itself is given values that tell groups of keys apart.
"""

from __future__ import annotations

from .cluster import affinity, attended, cluster, kmeans, propagate
from .heat import legend, overlay
from .keys import Cells, Key
from .masks import Masks, argmax, minmax, otsu, share, threshold
from .probe import probe
from .record import Recording, record

__all__ = [
    "Cells",
    "Key",
    "Masks",
    "Recording",
    "affinity",
    "argmax",
    "attended",
    "cluster",
    "kmeans",
    "legend",
    "minmax",
    "otsu",
    "overlay",
    "probe",
    "propagate",
    "record",
    "share",
    "threshold",
]
