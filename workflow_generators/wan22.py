"""Graphs of Wan 2.2, with the authors' settings from the README of Wan2.2."""

from __future__ import annotations

from typing import Any

from . import models, parts
from .canvas import Box, Columns, Model, Node, node


def expert_samplers(
    steps: int, switch: int, cfg: float, models: tuple[str, str] = ("shift_high", "shift_low"), **inputs: Any
) -> Box:
    """Return a sampler for the high-noise expert, and one for the low-noise expert that continues from its latent.

    Args:
        models: the nodes whose first output is the MODEL of each.
        inputs: links of the first sampler besides its model; the second gets all of them but the latent.
    """
    shared = {"steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
    high = node(
        "KSamplerAdvanced",
        title="High noise: first steps",
        model=[models[0], 0],
        add_noise="enable",
        noise_seed=1,
        start_at_step=0,
        end_at_step=switch,
        return_with_leftover_noise="enable",
        **shared,
        **inputs,
    )
    low = node(
        "KSamplerAdvanced",
        title="Low noise: last steps",
        model=[models[1], 0],
        add_noise="disable",
        noise_seed=0,
        control_after_generate="fixed",
        start_at_step=switch,
        end_at_step=10000,
        return_with_leftover_noise="disable",
        **shared,
        **{**inputs, "latent_image": ["high", 0]},
    )
    return Box("Sampling", {"high": high, "sampler": low})


def _experts(files: tuple[Model, Model]) -> Node:
    high, low = (file.name for file in files)
    return node("WanQuantExpertPairLoader", high_noise_name=high, low_noise_name=low, precision="auto")


def _lora(file: Model, slot: int) -> Node:
    return node("LoraLoaderModelOnly", models=[file], model=["model", slot], lora_name=file.name, strength_model=1.0)


def _shifts(shift: float, high: list[Any], low: list[Any]) -> dict[str, Node]:
    """Return the shift of each expert, with links from the two; the titles tell them apart."""
    return {
        f"shift_{noise}": node(
            "ModelSamplingSD3", title=f"{noise.capitalize()} noise: shift", model=expert, shift=shift
        )
        for noise, expert in (("high", high), ("low", low))
    }


def experts_t2v() -> Columns:
    text = (
        "Two experts of 14B share the work: one runs the first half of the steps, the other the rest. Only the one "
        "that runs is in VRAM. Settings: shift 8, 20 steps, cfg 3.5.\n\nAt 832 x 480 and 81 frames, sampling needs 4.2 "
        "GiB of VRAM, or 2.0 GiB with **Wan Low VRAM** (simulated)."
    )
    loaders = {
        "model": _experts(models.T2V_A14B),
        **_shifts(8.0, ["model", 0], ["model", 1]),
        "clip": parts.clip(),
        "vae": parts.vae(),
    }
    return [
        [parts.read_me("Wan 2.2 text to video, A14B", text, *models.T2V_A14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), parts.size(832, 480, 33)],
        [parts.prompt(parts.STREET)],
        [expert_samplers(20, 10, 3.5, latent_image=["empty", 0], **parts.PROMPTED)],
        [parts.video("wan2.2_t2v_A14B")],
    ]


def experts_4_steps() -> Columns:
    text = (
        "Uses the two experts with lightx2v's LoRAs, for 4 steps instead of 20. A LoRA is added to each layer as it "
        "runs, and the quantized file never changes. Settings: shift 5, 4 steps, cfg 1.\n\nAt 832 x 480 and 81 frames, "
        "sampling needs 4.2 GiB of VRAM, or 2.0 GiB with **Wan Low VRAM** (simulated)."
    )
    loaders = {
        "model": _experts(models.T2V_A14B),
        "lora_high": _lora(models.LORA_HIGH, 0),
        "lora_low": _lora(models.LORA_LOW, 1),
        **_shifts(5.0, ["lora_high", 0], ["lora_low", 0]),
    }
    files = (*models.T2V_A14B, models.LORA_HIGH, models.LORA_LOW, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.2 text to video in 4 steps, A14B", text, *files)],
        [Box("Models", loaders), Box("Text and video", {"clip": parts.clip(), "vae": parts.vae()})],
        [parts.prompt(parts.STREET), parts.size(832, 480, 33)],
        [expert_samplers(4, 2, 1.0, latent_image=["empty", 0], **parts.PROMPTED)],
        [parts.video("wan2.2_t2v_A14B_4_steps")],
    ]


def experts_i2v() -> Columns:
    text = (
        "Animates a picture with two experts of 14B, without CLIP Vision. Settings: shift 5, 20 steps, cfg 3.5.\n\n"
        "At 832 x 480 and 81 frames, sampling needs 4.4 GiB of VRAM, or 2.0 GiB with **Wan Low VRAM** (simulated)."
    )
    loaders = {
        "model": _experts(models.I2V_A14B),
        **_shifts(5.0, ["model", 0], ["model", 1]),
        "clip": parts.clip(),
        "vae": parts.vae(),
    }
    size = {"width": 832, "height": 480, "length": 33, "batch_size": 1}
    start = node("WanImageToVideo", **parts.PROMPTED, vae=["vae", 0], start_image=["image", 0], **size)
    conditioning = {"positive": ["start", 0], "negative": ["start", 1]}
    return [
        [parts.read_me("Wan 2.2 image to video, A14B", text, *models.I2V_A14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), Box("Picture", {"image": node("LoadImage", image="example.png")})],
        [parts.prompt(parts.PICTURE)],
        [Box("Video size", {"start": start})],
        [expert_samplers(20, 10, 3.5, latent_image=["start", 2], **conditioning)],
        [parts.video("wan2.2_i2v_A14B")],
    ]


def ti2v_5b() -> Columns:
    text = (
        "One model for text and pictures, with 24 frames per second and its own VAE. For image to video, connect a "
        "picture to `start_image`. The model is quantized on the first run. Settings: shift 8, 20 steps, cfg 5.\n\nAt "
        "1280 x 704 and 121 frames, sampling needs 3.2 GiB of VRAM, or 1.6 GiB with **Wan Low VRAM** (simulated)."
    )
    source = models.TI2V_5B
    loaders = {
        "model": node("WanQuantLoader", model_name="", path=["convert", 0], precision="auto"),
        "shift": parts.shift(8.0),
        "clip": parts.clip(),
        "vae": parts.vae(models.VAE_22),
    }
    size = {"width": 1280, "height": 704, "length": 49, "batch_size": 1}
    return [
        [parts.read_me("Wan 2.2 text and image to video, 5B", text, source, models.VAE_22, models.UMT5)],
        [
            Box(
                "Quantize once",
                {"convert": node("WanQuantConvert", models=[source], source=source.name, recipe="Q5_K_M")},
            )
        ],
        [Box("Models", loaders), Box("Video size", {"empty": node("Wan22ImageToVideoLatent", vae=["vae", 0], **size)})],
        [parts.prompt(parts.FOX)],
        [Box("Sampling", {"sampler": parts.sampler(20, 5.0, 1)})],
        [parts.video("wan2.2_ti2v_5B", fps=24.0)],
    ]


def experts_i2v_4_steps() -> Columns:
    text = (
        "Animates a picture in 4 steps, within 3.5 GiB of video memory. The experts take turns: main memory for one is"
        " enough, 9 GiB, and **Wan Low VRAM** streams it. A larger `budget_gib`, the same in both nodes, is faster. Put"
        " other LoRAs before it. Settings: shift 5, 4 steps, cfg 1.\n\nAt 832 x 480 and 81 frames, sampling"
        " needs 2.0 GiB of VRAM instead of 4.4 GiB (simulated)."
    )
    loaders = {
        "model": _experts(models.I2V_A14B),
        "lora_high": _lora(models.I2V_LORA_HIGH, 0),
        "lora_low": _lora(models.I2V_LORA_LOW, 1),
        **_shifts(5.0, ["lora_high", 0], ["lora_low", 0]),
        "vae": parts.vae(),
    }
    size = {"width": 832, "height": 480, "length": 81, "batch_size": 1}
    start = node("WanImageToVideo", **parts.ENCODED_ONCE, vae=["vae", 0], start_image=["image", 0], **size)
    memory = {
        "budget_high": parts.low_vram("shift_high", ["start", 2]),
        "budget": parts.low_vram("shift_low", ["start", 2]),
    }
    files = (*models.I2V_A14B, models.I2V_LORA_HIGH, models.I2V_LORA_LOW, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.2 image to video in 4 steps on a small GPU, A14B", text, *files)],
        [Box("Models", loaders)],
        [parts.prompt_encoded_once(parts.PICTURE), Box("Picture", {"image": parts.picture()})],
        [Box("Video size", {"start": start})],
        [Box("Memory: high noise, low noise", memory)],
        [expert_samplers(4, 2, 1.0, ("budget_high", "budget"), **parts.conditioned("start"))],
        [parts.video("wan2.2_i2v_A14B_4_steps", decode=parts.tiled_decode(vae=["vae", 0]))],
    ]


def animate() -> Columns:
    text = (
        "Makes the person of a picture move and speak like someone in a video. **Pose video** shows that person's"
        " skeleton and **Face video** the cropped face; a preprocessor such as DWPose makes both. Settings: shift 5,"
        " 20 steps, cfg 1.\n\nAt 832 x 480 and 77 frames, sampling needs 5.6 GiB of VRAM (simulated)."
    )
    loaders = {
        "model": parts.loader(models.ANIMATE_14B),
        "shift": parts.shift(5.0),
        "vae": parts.vae(),
        "clip_vision": parts.clip_vision(),
    }
    videos = parts.video_frames("pose", "pose.mp4", "Pose video") | parts.video_frames("face", "face.mp4", "Face video")
    start = node(
        "WanAnimateToVideo",
        **parts.ENCODED_ONCE,
        vae=["vae", 0],
        clip_vision_output=["seen", 0],
        reference_image=["image", 0],
        face_video=["face", 0],
        pose_video=["pose", 0],
        width=832,
        height=480,
        length=77,
        batch_size=1,
    )
    trim = node("TrimVideoLatent", samples=["sampler", 0], trim_amount=["start", 3])
    files = (models.ANIMATE_14B, models.CLIP_VISION, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.2 Animate, 14B", text, *files)],
        [Box("Models", loaders)],
        [Box("Videos", videos), Box("Picture", {"image": parts.picture(), **parts.seen()})],
        [parts.prompt_encoded_once(parts.PERSON)],
        [Box("Video size", {"start": start})],
        [Box("Sampling", {"sampler": parts.sampler(20, 1.0, 1, **parts.conditioned("start")), "trim": trim})],
        [parts.video("wan2.2_animate_14B", samples="trim")],
    ]


def speech() -> Columns:
    text = (
        "Makes the person of a picture speak or sing a recording. The video has the length of `length`, 77 frames or"
        " 4.8 seconds. Settings: shift 8, 20 steps, cfg 6.\n\nAt 640 x 640, sampling needs 5.1 GiB of VRAM, or"
        " 2.8 GiB with **Wan Low VRAM** (simulated)."
    )
    loaders = {
        "model": parts.loader(models.S2V_14B),
        "shift": parts.shift(8.0),
        "vae": parts.vae(),
        "listener": node(
            "AudioEncoderLoader", models=[models.AUDIO_ENCODER], audio_encoder_name=models.AUDIO_ENCODER.name
        ),
    }
    speech = {
        "sound": node("LoadAudio", audio="speech.wav"),
        "heard": node("AudioEncoderEncode", audio_encoder=["listener", 0], audio=["sound", 0]),
    }
    start = node(
        "WanSoundImageToVideo",
        **parts.ENCODED_ONCE,
        vae=["vae", 0],
        audio_encoder_output=["heard", 0],
        ref_image=["image", 0],
        width=640,
        height=640,
        length=77,
        batch_size=1,
    )
    files = (models.S2V_14B, models.AUDIO_ENCODER, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.2 speech to video, 14B", text, *files)],
        [Box("Models", loaders)],
        [Box("Speech", speech), Box("Picture", {"image": parts.picture()})],
        [parts.prompt_encoded_once(parts.PERSON)],
        [Box("Video size", {"start": start})],
        [Box("Sampling", {"sampler": parts.sampler(20, 6.0, 1, **parts.conditioned("start"))})],
        [parts.video("wan2.2_s2v_14B", audio=["sound", 0])],
    ]
