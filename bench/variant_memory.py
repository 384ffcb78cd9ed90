"""Peak video memory of each of ComfyUI's Wan model classes, with and without Wan Low VRAM; simulated, needs no GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import harness
from .template_memory import LARGE, SMALL, entry, simulator_of

if TYPE_CHECKING:
    import torch

    from ..ops.budget.sampling_job import SamplingJob

_MOST_BYTES = 64 << 30
# What tells a class where names and shapes of tensors do not.
_CONFIGS = {"CausalWanModel": {"causal_ar": True}, "WanAnimate2Model": {"model_type": "animate2"}}
_METADATA = {name: {"config": json.dumps({"transformer": config})} for name, config in _CONFIGS.items()}


def _jobs() -> dict[type[torch.nn.Module], tuple[dict[str, Any], SamplingJob]]:
    """Return the arguments of a model and what it samples, 832x480 and 81 frames, by class."""
    import comfy.ldm.wan.model as wan
    from comfy.ldm.wan.ar_model import CausalWanModel
    from comfy.ldm.wan.model_animate import AnimateWanModel
    from comfy.ldm.wan.model_wandancer import WanDancerModel

    from ..ops.budget.sampling_job import SamplingJob, clip_vision_entries

    video, picture = (1, 16, 21, 60, 104), (1, 16, 1, 60, 104)
    text = SamplingJob(video)
    image = text.with_entries(**clip_vision_entries(257))
    pose = text.with_entries(
        **clip_vision_entries(257), reference_latents=[entry(*picture)], pose_video_latent=entry(1, 16, 21, 30, 52)
    )
    speech = text.with_entries(
        audio_embed=entry(1, 25, 1024, 84), reference_latents=[entry(*picture)], control_video=entry(*video)
    )
    faces = text.with_entries(
        **clip_vision_entries(257),
        face_video_pixels=entry(1, 3, 77, 512, 512),
        pose_video_latent=entry(1, 16, 20, 60, 104),
        concat_latent_image=entry(*video),
        concat_mask=entry(1, 4, 21, 60, 104),
    )
    people = text.with_entries(audio_embed=entry(1, 21, 8, 5, 1280), reference_latents=[entry(*picture)])
    dance = text.with_entries(**clip_vision_entries(257), audio_embed=entry(1, 600, 35))
    camera = text.with_entries(**clip_vision_entries(257), camera_conditions=entry(1, 24, 21, 480, 832))
    found: dict[type[torch.nn.Module], tuple[dict[str, Any], SamplingJob]] = {
        wan.WanModel: (LARGE | {"model_type": "i2v", "in_dim": 36}, image),
        wan.VaceWanModel: (LARGE | {"vace_layers": 8, "vace_in_dim": 96}, text.with_control_videos(1)),
        wan.CameraWanModel: (LARGE | {"model_type": "camera", "in_dim": 32}, camera),
        wan.SCAILWanModel: (LARGE, pose),
        wan.SCAIL2WanModel: (LARGE, pose),
        wan.HumoWanModel: (LARGE | {"in_dim": 36}, people),
        wan.WanModel_S2V: (LARGE, speech),
        WanDancerModel: (LARGE | {"in_dim": 36}, dance),
        AnimateWanModel: (LARGE | {"in_dim": 36}, faces),
        CausalWanModel: (SMALL, SamplingJob(video, frames_at_a_time=1)),
    }
    try:
        from comfy.ldm.wan.model_animate2 import WanAnimate2Model
    except ImportError:  # before 0.33
        return found
    with_picture = (1, 16, 22, 60, 104)
    poses = SamplingJob(with_picture).with_entries(
        **clip_vision_entries(257),
        pose_video_latent=entry(*video),
        concat_latent_image=entry(*with_picture),
        concat_mask=entry(1, 4, *with_picture[2:]),
    )
    return found | {WanAnimate2Model: (LARGE | {"in_dim": 36, "model_type": "animate2"}, poses)}


def rows(recipe: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the peak of ComfyUI's own forward and the smallest one of Wan Low VRAM for these classes, in GiB."""
    from comfyui_version import __version__

    from ..ops.budget.choose_plan import choose_plan, closest_plan
    from ..ops.lean.variants import VARIANTS

    found = []
    for cls, (arguments, job) in _jobs().items():
        if classes and cls.__name__ not in classes:
            continue
        simulated = simulator_of(cls, arguments, recipe, _METADATA.get(cls.__name__))
        stock, least = choose_plan(simulated, job, _MOST_BYTES), closest_plan(simulated, job, 0)
        peaks = [round(choice.peak.total_bytes / harness.GIB, 2) for choice in (stock, least)]
        row = {"class": cls.__name__, "models": VARIANTS[cls.__name__].models, "level": VARIANTS[cls.__name__].level}
        row |= {"comfyui": __version__, "recipe": recipe}
        found.append(row | {"stock_gib": peaks[0], "least_gib": peaks[1]})
    return found


def _kept(results: Path | None) -> list[dict[str, Any]]:
    """Return the rows of the results, if they are to be written anew."""
    kept: list[dict[str, Any]] = json.loads(results.read_text())["rows"] if results else []
    return kept


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "variant-memory-simulated.json")
    parser.add_argument("--recipe", default="Q4_K_M")
    parser.add_argument("--classes", nargs="*", default=(), help="only these; rows of others stay in the results")
    options = parser.parse_args()
    harness.import_comfyui()
    logging.getLogger().setLevel(logging.ERROR)
    by_class = {row["class"]: row for row in (*_kept(options.update), *rows(options.recipe, options.classes))}
    found = list(by_class.values())
    cells = [[r["class"], r["level"], f"{r['stock_gib']:.2f}", f"{r['least_gib']:.2f}"] for r in found]
    text = harness.table(("class", "Wan Low VRAM", "ComfyUI's own, GiB", "least, GiB"), cells)
    harness.conclude(options, {"machine": harness.SIMULATED, "rows": found}, text)


if __name__ == "__main__":
    main()
