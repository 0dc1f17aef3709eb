"""Detectors and embeddings of transformers for `detections`, for pictures that are not of the toy world.

Nothing is loaded or fetched before a model is named. Some of their image processors need scipy: the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .detections import crop
from .layout import Box, Detection, iou

_QUERIES = {"grounding-dino": "{}.", "mm-grounding-dino": "{}."}
"""How a model wants a label to be asked for, where not as it is: these were trained on sentences."""


@dataclass(frozen=True)
class OpenVocabularyDetector:
    """transformers' zero-shot object detection: OwlViT, Owlv2, Grounding DINO.

    Attributes:
        pipe: a "zero-shot-object-detection" pipeline; `load` makes one.
        threshold: score in [0, 1] that a detection needs.
        overlap: of two detections of one label whose boxes overlap more (intersection over union), the surer one
            stays; without that the two surest of a label can be one thing.
    """

    pipe: Any
    threshold: float = 0.1
    overlap: float = 0.5

    @classmethod
    def load(
        cls, model: str = "google/owlv2-base-patch16-ensemble", threshold: float = 0.1, device: Any = None
    ) -> OpenVocabularyDetector:
        """The detector in a folder, or of a name that transformers knows how to fetch."""
        from transformers import pipeline

        return cls(pipeline("zero-shot-object-detection", model=model, device=device), threshold)

    def __call__(self, image: np.ndarray, labels: Sequence[str]) -> list[Detection]:
        """What is found under each label, surest first; see `detections.Detector`."""
        queries = {label: self._query(label) for label in labels}
        asked = {query: label for label, query in queries.items()}
        if not asked:
            return []
        found = self.pipe(Image.fromarray(image), candidate_labels=list(asked), threshold=self.threshold)
        boxes = [(asked[one["label"]], _shares(one["box"], image), float(one["score"])) for one in found]
        # Owlv2 pads pictures to a square and may find things there
        seen = [
            Detection(label, box, None, score) for label, box, score in boxes if box[0] < box[2] and box[1] < box[3]
        ]
        return _distinct(sorted(seen, key=lambda one: -one.score), self.overlap)

    def _query(self, label: str) -> str:
        return _QUERIES.get(self.pipe.model.config.model_type, "{}").format(label)


@dataclass(frozen=True)
class ImageEmbedding:
    """Embedding of the crop around a detection: CLIP's projected one, or the class token of DINOv2 and its like.

    Attributes:
        model: a transformers model with `get_image_features` or a `pooler_output`.
        processor: its image processor.
    """

    model: Any
    processor: Any

    @classmethod
    def load(cls, model: str = "facebook/dinov2-base", device: Any = None) -> ImageEmbedding:
        """The model in a folder, or of a name that transformers knows how to fetch."""
        from transformers import AutoImageProcessor, AutoModel

        loaded = AutoModel.from_pretrained(model).eval().requires_grad_(False)
        return cls(loaded if device is None else loaded.to(device), AutoImageProcessor.from_pretrained(model))

    def __call__(self, image: np.ndarray, found: Detection) -> np.ndarray:
        """float64 [D]; see `detections.Embed`."""
        import torch

        inputs = self.processor(images=Image.fromarray(crop(image, found.box)), return_tensors="pt")
        pixels = inputs["pixel_values"].to(device=self.model.device, dtype=self.model.dtype)
        with torch.no_grad():
            features = getattr(self.model, "get_image_features", self.model)(pixel_values=pixels)
        return features.pooler_output[0].double().cpu().numpy()


def _shares(box: dict[str, int], image: np.ndarray) -> Box:
    """Pixels as shares of the picture, cut at its edges."""
    height, width = image.shape[:2]
    x0, x1 = (min(max(box[name] / width, 0.0), 1.0) for name in ("xmin", "xmax"))
    y0, y1 = (min(max(box[name] / height, 0.0), 1.0) for name in ("ymin", "ymax"))
    return x0, y0, x1, y1


def _distinct(found: Sequence[Detection], overlap: float) -> list[Detection]:
    """Those that no surer one of their label overlaps more than so much."""
    kept: list[Detection] = []
    for one in found:
        if all(one.label != other.label or iou(one.box, other.box) <= overlap for other in kept):
            kept.append(one)
    return kept
