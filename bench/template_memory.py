"""Peak video memory in the templates' notes: of ComfyUI's own forward, and the least of Wan Low VRAM; simulated."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..quant.plan.recipe import find_recipe, plan_types
from ..quant.plan.wan_files import Source
from . import harness

if TYPE_CHECKING:
    from ..ops.budget.sampling_job import SamplingJob
    from ..ops.budget.simulator import Simulator

LARGE = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
SMALL = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}
MEDIUM = {"dim": 3072, "ffn_dim": 14336, "num_heads": 24, "num_layers": 30}
_FIRST_LAST_TOKENS = 514
"""CLIP Vision's tokens of two pictures."""
TEMPLATES = {
    "Calibrate and tune": "2.1 T2V 1.3B, 832x480x81",
    "Coming from ComfyUI-GGUF": "2.2 T2V A14B, 832x480x81",
    "Convert for speed (INT8)": "2.1 T2V 1.3B, 832x480x81",
    "What quantization costs": "2.1 T2V 1.3B, 832x480x81",
    "Wan 2.1 Fun Control, 1.3B": "2.1 Fun Control 1.3B, 832x480x33",
    "Wan 2.1 VACE on a small GPU, 14B": "2.1 VACE 14B, 832x480x81",
    "Wan 2.1 VACE, 14B": "2.1 VACE 14B, 832x480x81",
    "Wan 2.1 first and last frame, 14B": "2.1 FLF2V 14B, 832x480x33",
    "Wan 2.1 image to video, 14B": "2.1 I2V 14B, 832x480x81",
    "Wan 2.1 text to video in 3.5 GiB, 14B": "2.1 T2V 14B, 1280x720x81",
    "Wan 2.1 text to video, 1.3B": "2.1 T2V 1.3B, 832x480x81",
    "Wan 2.2 Animate, 14B": "2.2 Animate 14B, 832x480x77",
    "Wan 2.2 image to video in 4 steps on a small GPU, A14B": "2.2 I2V A14B, 832x480x81",
    "Wan 2.2 image to video, A14B": "2.2 I2V A14B, 832x480x81",
    "Wan 2.2 speech to video, 14B": "2.2 S2V 14B, 640x640x77",
    "Wan 2.2 text and image to video, 5B": "2.2 TI2V 5B, 1280x704x121",
    "Wan 2.2 text to video in 4 steps, A14B": "2.2 T2V A14B, 832x480x81",
    "Wan 2.2 text to video, A14B": "2.2 T2V A14B, 832x480x81",
}
"""The model and video of each template that samples."""


def entry(*shape: int) -> torch.Tensor:
    """Return a stand-in of a conditioning's tensor: float32, of this shape."""
    return torch.empty(()).expand(*shape)


def _jobs() -> dict[str, tuple[type[torch.nn.Module], dict[str, Any], SamplingJob]]:
    """Return the class, its arguments and what it samples, by the model and video."""
    import comfy.ldm.wan.model as wan
    from comfy.ldm.wan.model_animate import AnimateWanModel

    from ..ops.budget.sampling_job import SamplingJob, clip_vision_entries

    short, long = SamplingJob.for_video(832, 480, 33), SamplingJob.for_video(832, 480, 81)
    animate = SamplingJob.for_video(832, 480, 81).with_entries(  # 77 frames, and one latent frame for the picture
        **clip_vision_entries(257),
        face_video_pixels=entry(1, 3, 77, 512, 512),
        pose_video_latent=entry(1, 16, 20, 60, 104),
        concat_latent_image=entry(1, 16, 21, 60, 104),
        concat_mask=entry(1, 4, 21, 60, 104),
    )
    speech = SamplingJob.for_video(640, 640, 77).with_entries(
        audio_embed=entry(1, 25, 1024, 80),
        reference_latents=[entry(1, 16, 1, 80, 80)],
        control_video=entry(1, 16, 20, 80, 80),
    )
    pictures = {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": _FIRST_LAST_TOKENS}
    return {
        "2.1 T2V 1.3B, 832x480x81": (wan.WanModel, SMALL, long),
        "2.1 T2V 14B, 1280x720x81": (wan.WanModel, LARGE, SamplingJob.for_video(1280, 720, 81)),
        "2.1 I2V 14B, 832x480x81": (
            wan.WanModel,
            LARGE | {"model_type": "i2v", "in_dim": 36},
            long.with_entries(**clip_vision_entries(257)),
        ),
        "2.1 FLF2V 14B, 832x480x33": (
            wan.WanModel,
            LARGE | pictures,
            short.with_entries(**clip_vision_entries(_FIRST_LAST_TOKENS)),
        ),
        "2.1 Fun Control 1.3B, 832x480x33": (
            wan.WanModel,
            SMALL | {"model_type": "i2v", "in_dim": 48},
            short.with_entries(**clip_vision_entries(257)),
        ),
        "2.1 VACE 14B, 832x480x81": (
            wan.VaceWanModel,
            LARGE | {"vace_layers": 8, "vace_in_dim": 96},
            SamplingJob.for_video(832, 480, 85).with_control_videos(1),  # and one latent frame for the reference
        ),
        "2.2 T2V A14B, 832x480x81": (wan.WanModel, LARGE, long),
        "2.2 TI2V 5B, 1280x704x121": (
            wan.WanModel,
            MEDIUM | {"in_dim": 48, "out_dim": 48},
            SamplingJob.for_video(1280, 704, 121, channels=48),
        ),
        "2.2 I2V A14B, 832x480x81": (wan.WanModel, LARGE | {"in_dim": 36}, long),
        "2.2 Animate 14B, 832x480x77": (AnimateWanModel, LARGE | {"in_dim": 36}, animate),
        "2.2 S2V 14B, 640x640x77": (wan.WanModel_S2V, LARGE, speech),
    }


def simulator_of(
    cls: type[torch.nn.Module], arguments: dict[str, Any], recipe: str, metadata: dict[str, str] | None = None
) -> Simulator:
    """Return the simulator of a GGUF in a recipe; `arguments` are those of ComfyUI's class."""
    import comfy.ops
    from comfy.model_patcher import ModelPatcher

    from ..ops.budget.meta_wan import META, meta_model
    from ..ops.budget.simulator import Simulator

    with torch.device("meta"):
        made = cls(**arguments, dtype=torch.bfloat16, operations=comfy.ops.manual_cast)
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    types = plan_types(find_recipe(recipe), {name: Source(shape) for name, shape in shapes.items()}).types
    return Simulator.from_patcher(ModelPatcher(meta_model(shapes, types, metadata=metadata), META, META))


def rows(recipe: str) -> list[dict[str, Any]]:
    """Return the simulated peaks of each model in GiB."""
    from ..ops.budget.choose_plan import closest_plan

    found = []
    for model, (cls, arguments, job) in _jobs().items():
        simulated = simulator_of(cls, arguments, recipe)
        peaks = {"stock_gib": simulated.peak(job, None), "least_gib": closest_plan(simulated, job, 0).peak}
        sizes = {name: round(peak.total_bytes / harness.GIB, 3) for name, peak in peaks.items()}
        found.append({"model": model, "recipe": recipe, **sizes})
    return found


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "template-memory-simulated.json")
    parser.add_argument("--recipe", default="Q4_K_M")
    options = parser.parse_args()
    harness.import_comfyui()
    logging.getLogger().setLevel(logging.ERROR)
    found = rows(options.recipe)
    cells = [[row["model"], f"{row['stock_gib']:.2f}", f"{row['least_gib']:.2f}"] for row in found]
    text = harness.table(("model", "ComfyUI's own, GiB", "least, GiB"), cells)
    harness.conclude(options, {"machine": harness.SIMULATED, "rows": found}, text)


if __name__ == "__main__":
    main()
