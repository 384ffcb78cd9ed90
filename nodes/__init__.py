"""The pack's nodes, one per file. No other package uses folder_paths, schemas or progress bars."""

from __future__ import annotations

import re
from pathlib import Path

from comfy_api.latest import ComfyExtension, io

from ..ops.host_version import host_version
from ..quant.errors import PrintableLog
from .check import WanQuantCheck
from .compare_latents import WanQuantCompareLatents
from .convert import WanQuantConvert
from .folders import register_folders
from .inspect import WanQuantInspect
from .load_conditioning import WanQuantLoadConditioning
from .preview_decode import WanQuantPreviewDecode
from .replacements import register_replacements
from .save_conditioning import WanQuantSaveConditioning
from .save_importance import WanQuantSaveImportance
from .save_recovery_lora import WanQuantSaveRecoveryLora

logger = PrintableLog(__name__)


class WanQuantExtension(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()
        check_folder_name(Path(__file__).parent.parent.name)
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *model_nodes(),
            WanQuantConvert,
            WanQuantInspect,
            WanQuantSaveConditioning,
            WanQuantLoadConditioning,
            WanQuantPreviewDecode,
            WanQuantCompareLatents,
            WanQuantSaveImportance,
            WanQuantSaveRecoveryLora,
            WanQuantCheck,
        ]


def check_folder_name(name: str) -> None:
    """Warn of a name of the pack's folder with which ComfyUI's page does not find what the pack shows.

    ComfyUI serves no file of a folder whose name needs quoting in an address, and its page cuts a name at a dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        logger.warning(
            "WanQuant: its folder is named %r, so ComfyUI's page may not find its templates and help pages; rename the"
            " folder to ComfyUI-WanQuant, or to another name of letters, digits, - and _",
            name,
        )


def model_nodes() -> list[type[io.ComfyNode]]:
    """Return the nodes that work with loaded models, or none if an update of ComfyUI broke what they import."""
    try:
        from ..ops.host_check import incompatibilities, incompatibility_message
        from .advise import WanQuantAdvise
        from .collect_importance import WanQuantCollectImportance
        from .load_diffusion_model import WanQuantLoader
        from .load_expert_pair import WanQuantExpertPairLoader
        from .load_lora import WanQuantLoraLoader
        from .load_model_patch import WanQuantModelPatchLoader
        from .load_text_encoder import WanQuantTextEncoderLoader
        from .low_vram import WanQuantLowVRAM
        from .save_model import WanQuantSaveModel
        from .text_encode import WanQuantTextEncode
        from .tune import WanQuantTune
    except (ImportError, AttributeError) as error:
        logger.error(
            "WanQuant: the nodes that load models cannot start in ComfyUI %s (%s), but Convert to Quantized Model and"
            " GGUF Info work; update WanQuant",
            host_version(),
            error,
        )
        logger.debug("Traceback of the failed import", exc_info=error)
        return []
    if problems := incompatibilities():
        logger.error("WanQuant: %s", incompatibility_message(problems))
    return [
        WanQuantLoader,
        WanQuantExpertPairLoader,
        WanQuantTextEncoderLoader,
        WanQuantTextEncode,
        WanQuantModelPatchLoader,
        WanQuantLoraLoader,
        WanQuantCollectImportance,
        WanQuantSaveModel,
        WanQuantLowVRAM,
        WanQuantTune,
        WanQuantAdvise,
    ]
