"""Wrapper pipelines: a Diffusers pipeline and a document in, pictures that carry their recipe out."""

from __future__ import annotations

from typing import Any

from attnctrl.pipelines.base import ScenePicture
from attnctrl.pipelines.layout import LayoutPipeline, Subject
from attnctrl.pipelines.scene import ScenePipeline
from attnctrl.pipelines.settings import Settings
from attnctrl.pipelines.setup import Lora, Setup
from attnctrl.pipelines.style import StylePipeline
from attnctrl.pipelines.subjects import Character, MultiSubjectPipeline, Shot, Story

__all__ = [
    "Character",
    "LayoutPipeline",
    "Lora",
    "MultiSubjectPipeline",
    "ScenePicture",
    "ScenePipeline",
    "Settings",
    "Setup",
    "Shot",
    "Story",
    "StylePipeline",
    "Subject",
    "with_references",
]


def __getattr__(name: str) -> Any:
    # imports torch
    if name != "with_references":
        raise AttributeError(f"module 'attnctrl.pipelines' has no attribute '{name}'")
    from attnctrl.pipelines.references import with_references

    return with_references
