"""Wrapper pipelines: a Diffusers pipeline and a document in, pictures that carry their recipe out."""

from __future__ import annotations

from attnctrl.pipelines.scene import ScenePicture, ScenePipeline, Settings

__all__ = ["ScenePicture", "ScenePipeline", "Settings"]
