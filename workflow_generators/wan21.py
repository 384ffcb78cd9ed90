"""Graphs of Wan 2.1, with the authors' settings from the README of Wan2.1."""

from __future__ import annotations

from . import models, parts
from .canvas import Box, Columns, node

_SMALL = {"width": 832, "height": 480, "length": 33, "batch_size": 1}


def t2v_small() -> Columns:
    text = (
        "Quantizes the smallest Wan on the first run: **Convert to Quantized Model** makes the file, and later runs "
        "reuse it. Only the text encoder has to be downloaded by hand, and it is loaded only for a new prompt. "
        "Settings: shift 8, 30 steps, cfg 6.\n\nAt 832 x 480 and 81 frames, sampling needs 2.4 GiB of VRAM (simulated)."
    )
    source = models.T2V_1_3B
    convert = node("WanQuantConvert", models=[source], source=source.name, recipe="Q6_K")
    loaders = {
        "model": node("WanQuantLoader", model_name="", path=["convert", 0], precision="auto"),
        "shift": parts.shift(8.0),
        "vae": parts.vae(),
    }
    return [
        [parts.read_me("Wan 2.1 text to video, 1.3B", text, source, models.VAE_21, models.UMT5)],
        [Box("Quantize once", {"convert": convert})],
        [Box("Models", loaders), parts.size(832, 480, 33)],
        [parts.prompt_encoded_once(parts.FOX)],
        [Box("Sampling", {"sampler": parts.sampler(30, 6.0, 1, **parts.ENCODED_ONCE)})],
        [parts.video("wan2.1_t2v_1.3B")],
    ]


def low_vram() -> Columns:
    text = (
        "Runs 14B on a small GPU: **Wan Low VRAM** samples within `budget_gib`, and refuses what does not fit before "
        "the first step. The file is in main memory. The VAE decodes in tiles within the budget. Put LoRAs before Wan "
        "Low VRAM. Settings: shift 5, 30 steps, cfg 5.\n\nAt 1280 x 720 and 81 frames, sampling needs 3.5 GiB of VRAM "
        "instead of 8.5 GiB (simulated)."
    )
    size = {"width": 1280, "height": 720}
    loaders = {
        "model": parts.loader(models.T2V_14B),
        "shift": parts.shift(5.0),
        "vae": parts.vae(),
    }
    budget = node("WanQuantLowVRAM", model=["shift", 0], budget_gib=3.5, frames=81, **size)
    return [
        [parts.read_me("Wan 2.1 text to video in 3.5 GiB, 14B", text, models.T2V_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders)],
        [Box("Memory", {"budget": budget}), parts.size(**size, length=81)],
        [parts.prompt_encoded_once(parts.FOX)],
        [Box("Sampling", {"sampler": parts.sampler(30, 5.0, 1, model=["budget", 0], **parts.ENCODED_ONCE)})],
        [parts.video("wan2.1_t2v_14B_low_vram", decode=parts.tiled_decode(vae=["vae", 0]))],
    ]


def i2v() -> Columns:
    text = (
        "Animates a picture. This is the 480p model, so keep the area near 832 x 480. CLIP Vision also reads the "
        "picture, as in training. Settings: shift 3, 20 steps, cfg 6.\n\nAt 832 x 480 and 81 frames, sampling needs "
        "4.2 GiB of VRAM, or 2.0 GiB with **Wan Low VRAM** (simulated)."
    )
    loaders = {
        "model": parts.loader(models.I2V_14B),
        "shift": parts.shift(3.0),
        "clip": parts.clip(),
        "vae": parts.vae(),
    }
    vision = {
        "clip_vision": node("CLIPVisionLoader", models=[models.CLIP_VISION], clip_name=models.CLIP_VISION.name),
        "image": node("LoadImage", image="example.png"),
        "seen": node("CLIPVisionEncode", clip_vision=["clip_vision", 0], image=["image", 0], crop="none"),
    }
    start = node(
        "WanImageToVideo",
        **parts.PROMPTED,
        vae=["vae", 0],
        clip_vision_output=["seen", 0],
        start_image=["image", 0],
        width=832,
        height=480,
        length=33,
        batch_size=1,
    )
    conditioned = {"positive": ["start", 0], "negative": ["start", 1], "latent_image": ["start", 2]}
    files = (models.I2V_14B, models.CLIP_VISION, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.1 image to video, 14B", text, *files)],
        [Box("Models", loaders)],
        [Box("Picture", vision)],
        [parts.prompt(parts.PICTURE)],
        [Box("Video size", {"start": start})],
        [Box("Sampling", {"sampler": parts.sampler(20, 6.0, 1, **conditioned)})],
        [parts.video("wan2.1_i2v_14B")],
    ]


def vace() -> Columns:
    text = (
        "Makes a video with the subject of a reference picture. VACE also takes a control video and masks: connect "
        "them to **WanVaceToVideo**. Settings: shift 8, 20 steps, cfg 6.\n\nAt 832 x 480 and 81 frames, sampling needs "
        "5.7 GiB of VRAM, or 3.1 GiB with **Wan Low VRAM** (simulated)."
    )
    loaders = {
        "model": parts.loader(models.VACE_14B),
        "shift": parts.shift(8.0),
        "clip": parts.clip(),
        "vae": parts.vae(),
    }
    control = node(
        "WanVaceToVideo",
        **parts.PROMPTED,
        vae=["vae", 0],
        reference_image=["image", 0],
        width=832,
        height=480,
        length=33,
        batch_size=1,
        strength=1.0,
    )
    conditioned = {"positive": ["control", 0], "negative": ["control", 1], "latent_image": ["control", 2]}
    trim = node("TrimVideoLatent", samples=["sampler", 0], trim_amount=["control", 3])
    return [
        [parts.read_me("Wan 2.1 VACE, 14B", text, models.VACE_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), Box("Reference", {"image": node("LoadImage", image="example.png")})],
        [parts.prompt(parts.PICTURE)],
        [Box("Control", {"control": control})],
        [Box("Sampling", {"sampler": parts.sampler(20, 6.0, 1, **conditioned), "trim": trim})],
        [parts.video("wan2.1_vace_14B", samples="trim")],
    ]


def first_last_frame() -> Columns:
    text = (
        "Makes the video between two pictures, which CLIP Vision also reads. This is the 720p model; smaller sizes are"
        " faster. Settings: shift 8, 20 steps, cfg 3.\n\nAt 832 x 480 and 33 frames, sampling needs 2.3 GiB of VRAM,"
        " or 1.4 GiB with **Wan Low VRAM** (simulated). ComfyUI streams what does not fit."
    )
    loaders = {
        "model": parts.loader(models.FLF2V_14B),
        "shift": parts.shift(8.0),
        "vae": parts.vae(),
        "clip_vision": parts.clip_vision(),
    }
    first = {"first": parts.picture(), **parts.seen("first", "first_seen")}
    last = {"last": parts.picture(), **parts.seen("last", "last_seen")}
    start = node(
        "WanFirstLastFrameToVideo",
        **parts.ENCODED_ONCE,
        vae=["vae", 0],
        clip_vision_start_image=["first_seen", 0],
        clip_vision_end_image=["last_seen", 0],
        start_image=["first", 0],
        end_image=["last", 0],
        **_SMALL,
    )
    files = (models.FLF2V_14B, models.CLIP_VISION, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.1 first and last frame, 14B", text, *files)],
        [Box("Models", loaders)],
        [Box("First frame", first), Box("Last frame", last)],
        [parts.prompt_encoded_once(parts.PICTURE)],
        [Box("Video size", {"start": start})],
        [Box("Sampling", {"sampler": parts.sampler(20, 3.0, 1, **parts.conditioned("start"))})],
        [parts.video("wan2.1_flf2v_14B")],
    ]


def fun_control() -> Columns:
    text = (
        "Makes a video that follows the outlines of another one. Choose yours in **Control video**; depth or poses"
        " work instead of **Canny**. The picture says how it looks. The model is quantized on the first run. Settings:"
        " shift 5, 20 steps, cfg 6.\n\nAt 832 x 480 and 33 frames, sampling needs 1.5 GiB of VRAM (simulated)."
    )
    source = models.FUN_CONTROL_1_3B
    loaders = {
        "model": parts.converted_loader(),
        "shift": parts.shift(5.0),
        "vae": parts.vae(),
        "clip_vision": parts.clip_vision(),
    }
    control = parts.video_frames("control", "control.mp4", "Control video")
    control["edges"] = node("Canny", image=["control", 0], low_threshold=0.2, high_threshold=0.5)
    start = node(
        "WanFunControlToVideo",
        **parts.ENCODED_ONCE,
        vae=["vae", 0],
        clip_vision_output=["seen", 0],
        start_image=["image", 0],
        control_video=["edges", 0],
        **_SMALL,
    )
    files = (source, models.CLIP_VISION, models.VAE_21, models.UMT5)
    return [
        [parts.read_me("Wan 2.1 Fun Control, 1.3B", text, *files)],
        [Box("Quantize once", {"convert": parts.convert(source, "Q6_K")})],
        [Box("Models", loaders)],
        [Box("Control video", control), Box("Picture", {"image": parts.picture(), **parts.seen()})],
        [parts.prompt_encoded_once(parts.PICTURE)],
        [Box("Video size", {"start": start})],
        [Box("Sampling", {"sampler": parts.sampler(20, 6.0, 1, **parts.conditioned("start"))})],
        [parts.video("wan2.1_fun_control_1.3B")],
    ]


def vace_low_vram() -> Columns:
    text = (
        "VACE within 3.5 GiB of video memory: **Wan Low VRAM** chooses how to sample within `budget_gib`, and the tiles"
        " for the VAE. A larger budget is faster. Settings: shift 8, 20 steps, cfg 6.\n\nAt 832 x 480 and 81 frames,"
        " sampling needs 3.1 GiB of VRAM instead of 5.7 GiB (simulated)."
    )
    loaders = {"model": parts.loader(models.VACE_14B), "shift": parts.shift(8.0), "vae": parts.vae()}
    control = node(
        "WanVaceToVideo",
        **parts.ENCODED_ONCE,
        vae=["vae", 0],
        reference_image=["image", 0],
        width=832,
        height=480,
        length=81,
        batch_size=1,
        strength=1.0,
    )
    sampler = parts.sampler(20, 6.0, 1, **parts.conditioned("control") | {"model": ["budget", 0]})
    trim = node("TrimVideoLatent", samples=["sampler", 0], trim_amount=["control", 3])
    return [
        [parts.read_me("Wan 2.1 VACE on a small GPU, 14B", text, models.VACE_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), Box("Reference", {"image": parts.picture()})],
        [parts.prompt_encoded_once(parts.PICTURE)],
        [Box("Control", {"control": control}), Box("Memory", {"budget": parts.low_vram("shift", ["control", 2])})],
        [Box("Sampling", {"sampler": sampler, "trim": trim})],
        [parts.video("wan2.1_vace_14B_low_vram", decode=parts.tiled_decode("trim", vae=["vae", 0]))],
    ]
