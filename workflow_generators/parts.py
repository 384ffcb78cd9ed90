"""Parts that the graphs share: prompts, loaders, samplers and the nodes that write a video file."""

from __future__ import annotations

from typing import Any

from . import models
from .canvas import Box, Model, Node, node, note

_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
FOX = "A red fox runs through fresh snow between pines, low winter sun, the camera tracks beside it."
STREET = "A rainy street at night, neon signs mirrored in puddles, a cyclist in a yellow coat passes, slow dolly."
PICTURE = "The subject slowly turns towards the camera and smiles, soft light, gentle camera push in."
PERSON = "The person looks into the camera and moves naturally, soft light, static camera."
PROMPTED = {"positive": ["positive", 0], "negative": ["negative", 0]}
ENCODED_ONCE = {"positive": ["prompt", 0], "negative": ["prompt", 1]}
"""The links from `prompt_encoded_once`, in place of `PROMPTED`."""


def read_me(title: str, text: str, *files: Model) -> Box:
    """Return a note that lists every file with its size, folder and address."""
    rows = "\n".join(f"- [{file.name}]({file.url}), {file.gib} GiB → `models/{file.directory}`" for file in files)
    gguf = any(file.name.endswith(".gguf") for file in files)
    advice = "\n\nComfyUI offers to download `.safetensors` files; download `.gguf` files by hand, then press **R**."
    return note(f"# {title}\n\n{text}\n\n## Files\n\n{rows}{advice if gguf else ''}\n")


def clip() -> Node:
    return node("WanQuantTextEncoderLoader", encoder_name=models.UMT5.name, type="wan")


def vae(file: Model = models.VAE_21) -> Node:
    return node("VAELoader", models=[file], vae_name=file.name)


def prompt(text: str) -> Box:
    green, red = {"color": "#232", "bgcolor": "#353"}, {"color": "#322", "bgcolor": "#533"}
    positive = Node("CLIPTextEncode", {"text": text, "clip": ["clip", 0]}, "Prompt", color=green)
    negative = Node("CLIPTextEncode", {"text": _NEGATIVE, "clip": ["clip", 0]}, "Negative prompt", color=red)
    return Box("Prompt", {"positive": positive, "negative": negative})


def prompt_encoded_once(text: str) -> Box:
    """Return a prompt whose text encoder is loaded only when the text is new."""
    encode = node("WanQuantTextEncode", encoder_name=models.UMT5.name, type="wan", positive=text, negative=_NEGATIVE)
    return Box("Prompt", {"prompt": encode})


def low_vram(model: str, latent: list[Any]) -> Node:
    """Return Wan Low VRAM with its default budget; an automatic one would sample anew at every run."""
    return node("WanQuantLowVRAM", model=[model, 0], budget_gib=3.5, width=832, height=480, frames=81, latent=latent)


def loader(file: Model) -> Node:
    return node("WanQuantLoader", model_name=file.name, precision="auto")


def shift(shift: float, model: str = "model") -> Node:
    return node("ModelSamplingSD3", model=[model, 0], shift=shift)


def size(width: int, height: int, length: int) -> Box:
    latent = node("EmptyHunyuanLatentVideo", width=width, height=height, length=length, batch_size=1)
    return Box("Video size", {"empty": latent})


def sampler(steps: int, cfg: float, seed: int, **inputs: Any) -> Node:
    defaults = {"model": ["shift", 0], **PROMPTED, "latent_image": ["empty", 0]}
    settings = {"sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0}
    return node("KSampler", steps=steps, cfg=cfg, seed=seed, **defaults | settings | inputs)


def convert(source: Model, recipe: str, **inputs: Any) -> Node:
    return node("WanQuantConvert", models=[source], source=source.name, recipe=recipe, **inputs)


def converted_loader() -> Node:
    """Return a loader of the file that node `convert` makes."""
    return node("WanQuantLoader", model_name="", path=["convert", 0], precision="auto")


def picture(name: str = "example.png") -> Node:
    return node("LoadImage", image=name)


def video_frames(key: str, file: str, title: str) -> dict[str, Node]:
    """Return a loader of a video file, and the node `key` whose first output is its frames."""
    loaded = node("LoadVideo", title=title, file=file)
    return {f"{key}_file": loaded, key: node("GetVideoComponents", video=[f"{key}_file", 0])}


def seen(image: str = "image", key: str = "seen") -> dict[str, Node]:
    """Return CLIP Vision's view of a picture, as node `key`."""
    return {key: node("CLIPVisionEncode", clip_vision=["clip_vision", 0], image=[image, 0], crop="none")}


def clip_vision() -> Node:
    return node("CLIPVisionLoader", models=[models.CLIP_VISION], clip_name=models.CLIP_VISION.name)


def conditioned(start: str) -> dict[str, Any]:
    """Return a sampler's links from a node with positive, negative and latent."""
    return {"positive": [start, 0], "negative": [start, 1], "latent_image": [start, 2]}


def tiled_decode(samples: str = "sampler", **inputs: Any) -> Node:
    """Return a decoder with the tiles that node `budget` chose.

    The VAE decodes frame by frame, so tiles in time would save nothing.
    """
    tiles = {"tile_size": ["budget", 2], "overlap": ["budget", 3]}
    return node("VAEDecodeTiled", samples=[samples, 0], **tiles, temporal_size=4096, **inputs)


def video(name: str, fps: float = 16.0, samples: str = "sampler", decode: Node | None = None, **sound: Any) -> Box:
    return Box(
        "Video",
        {
            "decode": decode or node("VAEDecode", samples=[samples, 0], vae=["vae", 0]),
            "frames": node("CreateVideo", images=["decode", 0], fps=fps, **sound),
            "video": node(
                "SaveVideo", video=["frames", 0], filename_prefix=f"video/{name}", format="auto", codec="auto"
            ),
        },
    )
