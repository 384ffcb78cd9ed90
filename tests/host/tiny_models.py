"""Every model file that the templates ask for, under its name: the true structure, at a size that a CPU runs."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import comfy.audio_encoders.wav2vec2
import comfy.clip_model
import comfy.ldm.wan.model as wan
import comfy.ldm.wan.model_animate
import comfy.ldm.wan.vae
import comfy.ldm.wan.vae2_2
import comfy.ops
import comfy.text_encoders.t5
import numpy as np
import sentencepiece
import torch
from PIL import Image
from torch import nn

from wanquant.quant import QTYPES, convert
from wanquant.quant.files.sentencepiece import SPIECE_KEY
from wanquant.quant.gguf.layout import TensorSpec
from wanquant.quant.gguf.writer import GGUFWriter
from wanquant.testing.text_encoder_files import trained_tokenizer
from wanquant.testing.tiny_wan import random_tensor, write_random_checkpoint, write_sparse_checkpoint
from wanquant.workflow_generators import models

Shapes = dict[str, tuple[int, ...]]

HOST = Path(comfy.__path__[0])
OPERATIONS = comfy.ops.manual_cast
TEXT_DIM = 64  # 4096 in Wan; the host reads it from the checkpoint's config
TINY = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": TEXT_DIM}
# As comfy/audio_encoders/audio_encoders.py sets them for 1024 channels, which Wan 2.2 S2V expects.
AUDIO = {"embed_dim": 1024, "num_heads": 16, "num_layers": 24, "conv_norm": True, "conv_bias": True}
AUDIO |= {"do_normalize": True, "do_stable_layer_norm": True}
SAMPLE_RATE = 16000  # that of the audio encoder, so that nothing is resampled
METADATA = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}
VAE = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}


def write_models(folder: Path) -> None:
    """Fill a models folder."""
    for name in ("diffusion_models", "text_encoders", "vae", "clip_vision", "audio_encoders", "loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _write_diffusion_models(folder / "diffusion_models")
    _write_vaes(folder / "vae")
    write_text_encoder(folder / "text_encoders" / models.UMT5.name)
    # The host knows CLIP Vision H at its true size only: zeros, which take no disk.
    with (HOST / "clip_vision_config_h.json").open() as file:
        vision = _shapes(comfy.clip_model.CLIPVisionModelProjection, json.load(file), torch.float16, None, OPERATIONS)
    write_sparse_checkpoint(folder / "clip_vision" / models.CLIP_VISION.name, vision)
    down, up = (f"diffusion_model.blocks.0.ffn.0.lora_{part}.weight" for part in ("down", "up"))
    # As with CLIP Vision.
    audio = _shapes(comfy.audio_encoders.wav2vec2.Wav2Vec2Model, **AUDIO, dtype=torch.float16, operations=OPERATIONS)
    write_sparse_checkpoint(folder / "audio_encoders" / models.AUDIO_ENCODER.name, audio)
    for lora in (models.LORA_HIGH, models.LORA_LOW, models.I2V_LORA_HIGH, models.I2V_LORA_LOW):
        write_random_checkpoint(folder / "loras" / lora.name, {down: (4, TINY["dim"]), up: (TINY["ffn_dim"], 4)})


def write_inputs(folder: Path) -> None:
    """Fill an input folder: the picture of the host's own examples, in name, and the videos and the sound."""
    y, x = np.mgrid[0:96, 0:128]
    frame = np.stack([2 * x, 2 * y, 255 - x - y], axis=-1).astype(np.uint8)
    Image.fromarray(frame).save(folder / "example.png")
    for name in ("control.mp4", "pose.mp4", "face.mp4"):
        _write_video(folder / name, [np.roll(frame, 8 * number, axis=1) for number in range(5)])
    with wave.open(str(folder / "speech.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SAMPLE_RATE)
        tone = np.sin(np.arange(SAMPLE_RATE) * 0.2) * 8000
        sound.writeframes(tone.astype("<i2").tobytes())


def _write_video(path: Path, frames: list[np.ndarray]) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_diffusion_models(folder: Path) -> None:
    image = {"in_dim": 36}
    vace = {"vace_layers": 1, "vace_in_dim": 96}
    _write_wan(folder / models.T2V_1_3B.name, wan.WanModel)
    _write_wan(folder / models.TI2V_5B.name, wan.WanModel, in_dim=48, out_dim=48)
    for seed, file in enumerate((models.T2V_14B, *models.T2V_A14B)):
        _write_gguf(folder / file.name, wan.WanModel, seed=seed)
    for seed, file in enumerate(models.I2V_A14B):
        _write_gguf(folder / file.name, wan.WanModel, seed=seed, **image)
    _write_gguf(folder / models.I2V_14B.name, wan.WanModel, model_type="i2v", **image)
    _write_gguf(folder / models.FLF2V_14B.name, wan.WanModel, model_type="i2v", flf_pos_embed_token_number=514, **image)
    _write_wan(folder / models.FUN_CONTROL_1_3B.name, wan.WanModel, model_type="i2v", in_dim=48)
    _write_gguf(folder / models.VACE_14B.name, wan.VaceWanModel, **vace)
    _write_gguf(folder / models.S2V_14B.name, wan.WanModel_S2V)
    # The face adapter runs after every fifth block.
    animate = comfy.ldm.wan.model_animate.AnimateWanModel
    _write_gguf(folder / models.ANIMATE_14B.name, animate, num_layers=5, **image)


def _write_wan(path: Path, cls: Callable[..., nn.Module], seed: int = 0, **arguments: Any) -> Path:
    shapes = _shapes(cls, **TINY | arguments, dtype=torch.float32, operations=OPERATIONS)
    return write_random_checkpoint(path, shapes, seed=seed, metadata=METADATA)


def _write_gguf(path: Path, cls: Callable[..., nn.Module], seed: int = 0, **arguments: Any) -> None:
    source = _write_wan(path.with_suffix(".tmp.safetensors"), cls, seed, **arguments)
    convert(source, path, "Q4_K_M", effort="fast")
    source.unlink()


def _write_vaes(folder: Path) -> None:
    small = _shapes(comfy.ldm.wan.vae.WanVAE, dim=8, z_dim=16, image_channels=3, conv_out_channels=3, **VAE)
    write_random_checkpoint(folder / models.VAE_21.name, small)
    # As with CLIP Vision.
    write_sparse_checkpoint(folder / models.VAE_22.name, _shapes(comfy.ldm.wan.vae2_2.WanVAE, dim=160, z_dim=48, **VAE))


def write_text_encoder(path: Path) -> None:
    """24 blocks with an FFN of 10240, by which the host knows umT5-XXL; all else is small."""
    with (HOST / "text_encoders" / "umt5_config_xxl.json").open() as file:
        config = json.load(file)
    sentence = "the quick brown fox jumps over the lazy dog, 0123456789."
    tokenizer = trained_tokenizer([sentence] * 50, vocabulary=60)
    rows = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).get_piece_size()
    config |= {"vocab_size": rows, "d_model": TEXT_DIM, "num_heads": 2, "d_kv": TEXT_DIM // 2}
    shapes = _shapes(comfy.text_encoders.t5.T5, config, torch.float32, None, OPERATIONS)
    specs = [TensorSpec(name, QTYPES["Q8_0" if _divides(shape) else "F32"], shape) for name, shape in shapes.items()]
    metadata = {"general.architecture": "t5encoder", SPIECE_KEY: np.frombuffer(tokenizer, np.uint8)}
    generator = torch.Generator().manual_seed(0)
    with GGUFWriter(path, metadata, specs) as writer:
        for spec in specs:
            weight = random_tensor(spec.name, spec.shape, generator)
            writer.write(spec.name, spec.qtype.quantize(weight, effort="fast"))


def _divides(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[1] % 32 == 0


def _shapes(cls: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Shapes:
    """Tensor shapes of one of the host's models, without making them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in cls(*args, **kwargs).state_dict().items()}
