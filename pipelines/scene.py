"""Scenes on Stable Diffusion, SD3 and FLUX: text to picture, and on FLUX picture to picture (Kontext) with references.

pipe = ScenePipeline.from_pretrained("toy-flux")
picture = pipe(load_scene("scene.yaml"))[0]
picture.save("out/scene.png")
"""

from __future__ import annotations

from collections.abc import Sequence

from attnctrl.pipelines.base import Progress, ScenePicture, Wrapper

from attnctrl.errors import SceneError
from attnctrl.scene import MAX_SEED, Scene

__all__ = ["ScenePipeline"]


class ScenePipeline(Wrapper):
    """Runs scenes on a pipeline, the user's own or one loaded by name. The pipeline stays what it is."""

    def __call__(
        self,
        scene: Scene,
        seeds: Sequence[int] | None = None,
        controlled: bool = True,
        progress: Progress | None = None,
    ) -> list[ScenePicture]:
        """Pictures of `scene`, one for each seed; each has its own generator and does not depend on the others.

        Args:
            scene: What to show, see `attnctrl.scene`.
            seeds: Of the starting noise; the scene's own seed if left out.
            controlled: False leaves the controls out and changes nothing else.
            progress: Called after every step of every picture.

        Raises:
            SceneError: The scene asks for what the model cannot do.
        """
        wanted = [scene.seed] if seeds is None else list(seeds)
        if wrong := [seed for seed in wanted if not 0 <= seed <= MAX_SEED]:
            raise SceneError(f"seed: must be in 0 .. {MAX_SEED}; found {wrong[0]}; take another one.")
        controls = scene.build_controls(self.regions(scene)) if controlled else []
        return [picture for seed in wanted for picture in self.draw([scene], [[seed]], controls, controlled, progress)]
