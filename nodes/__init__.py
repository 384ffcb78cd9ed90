"""The pack's nodes, one a file. The only place with folder_paths, schemas and progress bars."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .collect_importance import WanQuantCollectImportance
from .compare_latents import WanQuantCompareLatents
from .convert import WanQuantConvert
from .folders import register_folders
from .inspect import WanQuantInspect
from .load_conditioning import WanQuantLoadConditioning
from .load_diffusion_model import WanQuantLoader
from .load_expert_pair import WanQuantExpertPairLoader
from .load_text_encoder import WanQuantTextEncoderLoader
from .low_vram import WanQuantLowVRAM
from .preview_decode import WanQuantPreviewDecode
from .replacements import register_replacements
from .save_conditioning import WanQuantSaveConditioning
from .save_importance import WanQuantSaveImportance
from .save_model import WanQuantSaveModel
from .save_recovery_lora import WanQuantSaveRecoveryLora


class WanQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            WanQuantLoader,
            WanQuantExpertPairLoader,
            WanQuantTextEncoderLoader,
            WanQuantConvert,
            WanQuantInspect,
            WanQuantSaveConditioning,
            WanQuantLoadConditioning,
            WanQuantPreviewDecode,
            WanQuantCompareLatents,
            WanQuantCollectImportance,
            WanQuantSaveImportance,
            WanQuantSaveModel,
            WanQuantSaveRecoveryLora,
            WanQuantLowVRAM,
        ]
