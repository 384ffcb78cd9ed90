"""The graphs behind workflows/: settings are the model authors' own, from the READMEs of Wan2.1 and Wan2.2."""

from __future__ import annotations

from typing import Any

from . import models
from .canvas import Box, Columns, Model, Node, Schemas, node, note

_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_FOX = "A red fox runs through fresh snow between pines, low winter sun, the camera tracks beside it."
_STREET = "A rainy street at night, neon signs mirrored in puddles, a cyclist in a yellow coat passes, slow dolly."
_PICTURE = "The subject slowly turns towards the camera and smiles, soft light, gentle camera push in."
_PROMPTED = {"positive": ["positive", 0], "negative": ["negative", 0]}


# What the migration starts from, as city96/ComfyUI-GGUF nodes.py @ 795e451 declares it.
COMFYUI_GGUF: Schemas = {
    "UnetLoaderGGUF": {
        "input": {"required": {"unet_name": ["COMBO"]}},
        "output": ["MODEL"],
        "output_name": ["MODEL"],
    },
    "CLIPLoaderGGUF": {
        "input": {"required": {"clip_name": ["COMBO"], "type": ["COMBO"]}},
        "output": ["CLIP"],
        "output_name": ["CLIP"],
    },
}


def templates() -> dict[str, Columns]:
    """File name in workflows/ -> its graph."""
    return {
        "convert_any_wan": _convert_any(),
        "wan2.1_t2v_1.3B": _t2v_small(),
        "wan2.1_t2v_14B_low_vram": _low_vram(),
        "wan2.1_i2v_14B_480p": _i2v(),
        "wan2.1_vace_14B": _vace(),
        "wan2.2_t2v_A14B": _experts_t2v(),
        "wan2.2_t2v_A14B_4_steps": _experts_4_steps(),
        "wan2.2_i2v_A14B": _experts_i2v(),
        "wan2.2_ti2v_5B": _ti2v_5b(),
        "quality_comparison": _quality(),
        "migrate_from_comfyui_gguf": _migrate(),
    }


def _read_me(title: str, text: str, *files: Model) -> Box:
    """A note that lists every file with its folder and address."""
    rows = "\n".join(f"- [{file.name}]({file.url}) → `models/{file.directory}`" for file in files)
    gguf = any(file.name.endswith(".gguf") for file in files)
    advice = "\n\nComfyUI offers to download `.safetensors` files; fetch `.gguf` files by hand, then press **R**."
    return note(f"# {title}\n\n{text}\n\n## Files\n\n{rows}{advice if gguf else ''}\n")


def _clip() -> Node:
    return node("WanQuantTextEncoderLoader", encoder_name=models.UMT5.name, type="wan")


def _vae(file: Model = models.VAE_21) -> Node:
    return node("VAELoader", models=[file], vae_name=file.name)


def _prompt(text: str) -> Box:
    green, red = {"color": "#232", "bgcolor": "#353"}, {"color": "#322", "bgcolor": "#533"}
    positive = Node("CLIPTextEncode", {"text": text, "clip": ["clip", 0]}, "Prompt", color=green)
    negative = Node("CLIPTextEncode", {"text": _NEGATIVE, "clip": ["clip", 0]}, "Negative prompt", color=red)
    return Box("Prompt", {"positive": positive, "negative": negative})


def _loader(file: Model) -> Node:
    return node("WanQuantLoader", model_name=file.name)


def _shift(shift: float, model: str = "model", slot: int = 0) -> Node:
    return node("ModelSamplingSD3", model=[model, slot], shift=shift)


def _size(width: int, height: int, length: int) -> Box:
    latent = node("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1)
    return Box("Video size", {"empty": latent})


def _sampler(steps: int, cfg: float, seed: int, **inputs: Any) -> Node:
    defaults = {"model": ["shift", 0], **_PROMPTED, "latent_image": ["empty", 0]}
    settings = {"sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0}
    return node("KSampler", steps=steps, cfg=cfg, seed=seed, **defaults | settings | inputs)


def tiled_decode(**inputs: Any) -> Node:
    """In tiles that node `budget` chose. The VAE decodes frame by frame, so that tiles in time would save nothing."""
    tiles = {"tile_size": ["budget", 2], "overlap": ["budget", 3]}
    return node("VAEDecodeTiled", samples=["sampler", 0], **tiles, temporal_size=4096, **inputs)


def _video(name: str, fps: float = 16.0, samples: str = "sampler", decode: Node | None = None) -> Box:
    return Box(
        "Video",
        {
            "decode": decode or node("VAEDecode", samples=[samples, 0], vae=["vae", 0]),
            "frames": node("CreateVideo", images=["decode", 0], fps=fps),
            "video": node(
                "SaveVideo", video=["frames", 0], filename_prefix=f"video/{name}", format="auto", codec="auto"
            ),
        },
    )


def _convert_any() -> Columns:
    text = (
        "Choose any Wan checkpoint as `source`. The first node makes a file by **recipe** (Q8_0 nearly lossless, "
        "Q4_K_M the usual choice, Q2_K the smallest); the second makes one of the **size** you ask for, in GiB, with "
        "the lowest error in that size.\n\nNo GPU is needed. A file that is already there and made the same way is "
        "reused, so the nodes can stay in front of a loader: connect `path` to **Load Diffusion Model (GGUF)**."
    )
    source = models.T2V_1_3B
    recipe = node("WanQuantConvert", title="Convert by recipe", models=[source], source=source.name, recipe="Q4_K_M")
    size = node(
        "WanQuantConvert",
        title="Convert to a size",
        models=[source],
        source=source.name,
        recipe="Q4_K_M",
        target_size=0.8,
    )
    save = node("SaveImage", images=["size", 1], filename_prefix="wanquant/report")
    return [
        [_read_me("Convert any Wan to GGUF", text, source)],
        [Box("By recipe", {"recipe": recipe})],
        [Box("By size", {"size": size})],
        [Box("Report", {"report": save})],
    ]


def _t2v_small() -> Columns:
    text = (
        "The smallest Wan, quantized on the first run: **Convert to GGUF** makes the file, later runs reuse it. Only "
        "the text encoder has to be fetched by hand. Settings: shift 8, 30 steps, cfg 6."
    )
    source = models.T2V_1_3B
    convert = node("WanQuantConvert", models=[source], source=source.name, recipe="Q6_K")
    loaders = {
        "model": node("WanQuantLoader", model_name="", path=["convert", 0]),
        "shift": _shift(8.0),
        "clip": _clip(),
        "vae": _vae(),
    }
    return [
        [_read_me("Wan 2.1 text to video, 1.3B", text, source, models.VAE_21, models.UMT5)],
        [Box("Quantize once", {"convert": convert})],
        [Box("Models", loaders), _size(832, 480, 33)],
        [_prompt(_FOX)],
        [Box("Sampling", {"sampler": _sampler(30, 6.0, 1)})],
        [_video("wan2.1_t2v_1.3B")],
    ]


def _low_vram() -> Columns:
    text = (
        "14B on a small GPU: **Wan Low VRAM** samples within `budget_gib`, and shows the predicted peak for the size "
        "that is set on it. The latent decides: a size that does not fit is refused before the first step. The file's "
        "9 GiB lie in main memory.\n\nThe VAE decodes in tiles of the size that the budget allows; ComfyUI places the "
        "text encoder as it sees fit. LoRAs go in front of Wan Low VRAM. Settings: shift 5, 30 steps, cfg 5."
    )
    size = {"width": 1280, "height": 720}
    loaders = {"model": _loader(models.T2V_14B), "shift": _shift(5.0), "clip": _clip(), "vae": _vae()}
    budget = node("WanQuantLowVRAM", model=["shift", 0], budget_gib=3.5, frames=81, **size)
    return [
        [_read_me("Wan 2.1 text to video, 14B in 3.5 GiB", text, models.T2V_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders)],
        [Box("Memory", {"budget": budget}), _size(**size, length=81)],
        [_prompt(_FOX)],
        [Box("Sampling", {"sampler": _sampler(30, 5.0, 1, model=["budget", 0])})],
        [_video("wan2.1_t2v_14B_low_vram", decode=tiled_decode(vae=["vae", 0]))],
    ]


def _i2v() -> Columns:
    text = (
        "Animates a picture. 480p model: keep the area near 832 x 480. The picture is also read by CLIP Vision, as the "
        "model was trained. Settings: shift 3, 20 steps, cfg 6."
    )
    loaders = {"model": _loader(models.I2V_14B), "shift": _shift(3.0), "clip": _clip(), "vae": _vae()}
    vision = {
        "clip_vision": node("CLIPVisionLoader", models=[models.CLIP_VISION], clip_name=models.CLIP_VISION.name),
        "image": node("LoadImage", image="example.png"),
        "seen": node("CLIPVisionEncode", clip_vision=["clip_vision", 0], image=["image", 0], crop="none"),
    }
    start = node(
        "WanImageToVideo",
        **_PROMPTED,
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
        [_read_me("Wan 2.1 image to video, 14B 480p", text, *files)],
        [Box("Models", loaders)],
        [Box("Picture", vision)],
        [_prompt(_PICTURE)],
        [Box("Video size", {"start": start})],
        [Box("Sampling", {"sampler": _sampler(20, 6.0, 1, **conditioned)})],
        [_video("wan2.1_i2v_14B")],
    ]


def _vace() -> Columns:
    text = (
        "Makes a video with the subject of a reference picture. VACE also takes a control video and masks: connect "
        "them to **WanVaceToVideo**. Settings: shift 8, 20 steps, cfg 6."
    )
    loaders = {"model": _loader(models.VACE_14B), "shift": _shift(8.0), "clip": _clip(), "vae": _vae()}
    control = node(
        "WanVaceToVideo",
        **_PROMPTED,
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
        [_read_me("Wan 2.1 VACE, 14B", text, models.VACE_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), Box("Reference", {"image": node("LoadImage", image="example.png")})],
        [_prompt(_PICTURE)],
        [Box("Control", {"control": control})],
        [Box("Sampling", {"sampler": _sampler(20, 6.0, 1, **conditioned), "trim": trim})],
        [_video("wan2.1_vace_14B", samples="trim")],
    ]


def expert_samplers(steps: int, switch: int, cfg: float, **inputs: Any) -> Box:
    """The high-noise expert does the first steps, the low-noise expert goes on from its latent.

    Args:
        inputs: links that the first sampler takes beside its model; the second takes all but the latent.
    """
    shared = {"steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple"}
    high = node(
        "KSamplerAdvanced",
        title="High noise: first steps",
        model=["shift_high", 0],
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
        model=["shift_low", 0],
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
    return node("WanQuantExpertPairLoader", high_noise_name=high, low_noise_name=low)


def _experts_t2v() -> Columns:
    text = (
        "Two experts of 14B share the work: one for the first half of the steps, one for the rest. Only the one that "
        "runs is in VRAM. Settings: shift 8, 20 steps, cfg 3.5."
    )
    loaders = {
        "model": _experts(models.T2V_A14B),
        "shift_high": _shift(8.0),
        "shift_low": _shift(8.0, slot=1),
        "clip": _clip(),
        "vae": _vae(),
    }
    return [
        [_read_me("Wan 2.2 text to video, A14B", text, *models.T2V_A14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), _size(832, 480, 33)],
        [_prompt(_STREET)],
        [expert_samplers(20, 10, 3.5, latent_image=["empty", 0], **_PROMPTED)],
        [_video("wan2.2_t2v_A14B")],
    ]


def _experts_4_steps() -> Columns:
    text = (
        "The two experts with lightx2v's LoRAs: 4 steps instead of 20, cfg 1. A LoRA is added to each layer as it "
        "runs; the quantized file is never changed. Settings: shift 5, 4 steps, cfg 1."
    )

    def lora(file: Model, slot: int) -> Node:
        return node(
            "LoraLoaderModelOnly", models=[file], model=["model", slot], lora_name=file.name, strength_model=1.0
        )

    loaders = {
        "model": _experts(models.T2V_A14B),
        "lora_high": lora(models.LORA_HIGH, 0),
        "lora_low": lora(models.LORA_LOW, 1),
        "shift_high": _shift(5.0, "lora_high"),
        "shift_low": _shift(5.0, "lora_low"),
    }
    files = (*models.T2V_A14B, models.LORA_HIGH, models.LORA_LOW, models.VAE_21, models.UMT5)
    return [
        [_read_me("Wan 2.2 in 4 steps", text, *files)],
        [Box("Models", loaders), Box("Text and video", {"clip": _clip(), "vae": _vae()})],
        [_prompt(_STREET), _size(832, 480, 33)],
        [expert_samplers(4, 2, 1.0, latent_image=["empty", 0], **_PROMPTED)],
        [_video("wan2.2_t2v_A14B_4_steps")],
    ]


def _experts_i2v() -> Columns:
    text = "Animates a picture with two experts of 14B; no CLIP Vision is needed. Settings: shift 5, 20 steps, cfg 3.5."
    loaders = {
        "model": _experts(models.I2V_A14B),
        "shift_high": _shift(5.0),
        "shift_low": _shift(5.0, slot=1),
        "clip": _clip(),
        "vae": _vae(),
    }
    size = {"width": 832, "height": 480, "length": 33, "batch_size": 1}
    start = node("WanImageToVideo", **_PROMPTED, vae=["vae", 0], start_image=["image", 0], **size)
    conditioning = {"positive": ["start", 0], "negative": ["start", 1]}
    return [
        [_read_me("Wan 2.2 image to video, A14B", text, *models.I2V_A14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), Box("Picture", {"image": node("LoadImage", image="example.png")})],
        [_prompt(_PICTURE)],
        [Box("Video size", {"start": start})],
        [expert_samplers(20, 10, 3.5, latent_image=["start", 2], **conditioning)],
        [_video("wan2.2_i2v_A14B")],
    ]


def _ti2v_5b() -> Columns:
    text = (
        "One model for text and pictures, 24 frames a second, with a VAE of its own. For image to video connect a "
        "picture to `start_image`. It is quantized on the first run. Settings: shift 8, 20 steps, cfg 5."
    )
    source = models.TI2V_5B
    loaders = {
        "model": node("WanQuantLoader", model_name="", path=["convert", 0]),
        "shift": _shift(8.0),
        "clip": _clip(),
        "vae": _vae(models.VAE_22),
    }
    size = {"width": 1280, "height": 704, "length": 49, "batch_size": 1}
    return [
        [_read_me("Wan 2.2 text and image to video, 5B", text, source, models.VAE_22, models.UMT5)],
        [
            Box(
                "Quantize once",
                {"convert": node("WanQuantConvert", models=[source], source=source.name, recipe="Q5_K_M")},
            )
        ],
        [Box("Models", loaders), Box("Video size", {"empty": node("Wan22ImageToVideoLatent", vae=["vae", 0], **size)})],
        [_prompt(_FOX)],
        [Box("Sampling", {"sampler": _sampler(20, 5.0, 1)})],
        [_video("wan2.2_ti2v_5B", fps=24.0)],
    ]


def _quality() -> Columns:
    text = (
        "The same seed with the full-precision model and with the quantized one. **Compare Latents** shows PSNR, which "
        "frames differ, and where. Change the recipe or set a `target_size` and run again: only what changed is made."
    )
    source = models.T2V_1_3B
    full = node("UNETLoader", models=[source], unet_name=source.name, weight_dtype="default")
    quantized = {
        "convert": node("WanQuantConvert", models=[source], source=source.name, recipe="Q4_K_M"),
        "model": node("WanQuantLoader", model_name="", path=["convert", 0]),
        "shift": _shift(8.0),
    }
    reference = {"full": full, "shift_full": _shift(8.0, "full"), "clip": _clip(), "vae": _vae()}
    samplers = {
        "reference": _sampler(20, 6.0, 1, model=["shift_full", 0], control_after_generate="fixed"),
        "sampler": _sampler(20, 6.0, 1, control_after_generate="fixed"),
    }
    compare = node("WanQuantCompareLatents", reference=["reference", 0], compared=["sampler", 0])
    plot = node("SaveImage", images=["compare", 2], filename_prefix="wanquant/comparison")
    return [
        [_read_me("What quantization costs", text, source, models.VAE_21, models.UMT5)],
        [Box("Quantized", quantized)],
        [Box("Full precision", reference), _size(832, 480, 33)],
        [_prompt(_FOX)],
        [Box("The same seed", samplers)],
        [Box("Compare", {"compare": compare, "plot": plot})],
        [_video("quality_comparison")],
    ]


def _migrate() -> Columns:
    text = (
        "A graph made with ComfyUI-GGUF. Without that pack ComfyUI offers to replace its loaders by this pack's: "
        "accept, and run. Files and links stay as they are. With both packs installed, both kinds of loaders work "
        "side by side."
    )
    loaders = {
        "model": node("UnetLoaderGGUF", unet_name=models.T2V_14B.name),
        "shift": _shift(5.0),
        "clip": node("CLIPLoaderGGUF", clip_name=models.UMT5.name, type="wan"),
        "vae": _vae(),
    }
    return [
        [_read_me("Coming from ComfyUI-GGUF", text, models.T2V_14B, models.VAE_21, models.UMT5)],
        [Box("Models", loaders), _size(832, 480, 33)],
        [_prompt(_FOX)],
        [Box("Sampling", {"sampler": _sampler(30, 6.0, 1)})],
        [_video("migrated")],
    ]
