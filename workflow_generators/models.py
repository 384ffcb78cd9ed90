"""The model files of the templates, with their addresses.

The .safetensors files are those of ComfyUI's own templates (comfyui-workflow-templates 0.11.27), so ComfyUI offers to
download them. It does not do so for .gguf files, so notes give their addresses. Sizes are those of the files, those of
Fun Control and FLF2V by the shapes of their tensors.
"""

from __future__ import annotations

from .canvas import Model

_WAN21 = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
_WAN22 = "https://huggingface.co/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"


def _file(folder: str, directory: str, name: str, gib: float) -> Model:
    return Model(name, f"{folder}/{directory}/{name}", directory, gib)


VAE_21 = _file(_WAN21, "vae", "wan_2.1_vae.safetensors", 0.2)
VAE_22 = _file(_WAN22, "vae", "wan2.2_vae.safetensors", 1.3)
CLIP_VISION = _file(_WAN21, "clip_vision", "clip_vision_h.safetensors", 1.2)
T2V_1_3B = _file(_WAN21, "diffusion_models", "wan2.1_t2v_1.3B_fp16.safetensors", 2.6)
TI2V_5B = _file(_WAN22, "diffusion_models", "wan2.2_ti2v_5B_fp16.safetensors", 9.3)
FUN_CONTROL_1_3B = _file(_WAN21, "diffusion_models", "wan2.1_fun_control_1.3B_bf16.safetensors", 2.9)
AUDIO_ENCODER = _file(_WAN22, "audio_encoders", "wav2vec2_large_english_fp16.safetensors", 0.6)
LORA_HIGH = _file(_WAN22, "loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", 1.1)
LORA_LOW = _file(_WAN22, "loras", "wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors", 1.1)
I2V_LORA_HIGH = _file(_WAN22, "loras", "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", 1.1)
I2V_LORA_LOW = _file(_WAN22, "loras", "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors", 1.1)

_CITY96 = "https://huggingface.co/city96"
_QUANTSTACK = "https://huggingface.co/QuantStack"


def _gguf(repository: str, path: str, gib: float, directory: str = "diffusion_models") -> Model:
    return Model(path.rpartition("/")[2], f"{repository}/resolve/main/{path}", directory, gib)


def _experts(task: str) -> tuple[Model, Model]:
    repository = f"{_QUANTSTACK}/Wan2.2-{task}-A14B-GGUF"
    return (
        _gguf(repository, f"HighNoise/Wan2.2-{task}-A14B-HighNoise-Q4_K_M.gguf", 9.0),
        _gguf(repository, f"LowNoise/Wan2.2-{task}-A14B-LowNoise-Q4_K_M.gguf", 9.0),
    )


UMT5 = _gguf(f"{_CITY96}/umt5-xxl-encoder-gguf", "umt5-xxl-encoder-Q5_K_M.gguf", 3.9, "text_encoders")
T2V_14B = _gguf(f"{_CITY96}/Wan2.1-T2V-14B-gguf", "wan2.1-t2v-14b-Q4_K_M.gguf", 9.4)
I2V_14B = _gguf(f"{_CITY96}/Wan2.1-I2V-14B-480P-gguf", "wan2.1-i2v-14b-480p-Q4_K_M.gguf", 10.5)
FLF2V_14B = _gguf(f"{_CITY96}/Wan2.1-FLF2V-14B-720P-gguf", "wan2.1-flf2v-14b-720p-Q4_K_M.gguf", 10.5)
VACE_14B = _gguf(f"{_QUANTSTACK}/Wan2.1_14B_VACE-GGUF", "Wan2.1_14B_VACE-Q4_K_M.gguf", 10.8)
ANIMATE_14B = _gguf(f"{_QUANTSTACK}/Wan2.2-Animate-14B-GGUF", "Wan2.2-Animate-14B-Q4_K_M.gguf", 10.7)
S2V_14B = _gguf(f"{_QUANTSTACK}/Wan2.2-S2V-14B-GGUF", "Wan2.2-S2V-14B-Q4_K_M.gguf", 12.9)
T2V_A14B = _experts("T2V")
I2V_A14B = _experts("I2V")
