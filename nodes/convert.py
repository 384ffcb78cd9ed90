"""WanQuantConvert."""

from __future__ import annotations

import os
from collections.abc import Sequence

from comfy_api.latest import io

from ..quant.conversion.convert import convert
from ..quant.qtype import Effort
from . import encoding
from .folders import (
    IMPORTANCE,
    NONE,
    check_names,
    destinations,
    model_path,
    output_path,
    portable,
    source_folder,
    source_names,
    source_stem,
    stat_token,
    written_token,
)

_FLAT, _DEEP = "4d", "5d"


class WanQuantConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantConvert",
            display_name="Convert to GGUF",
            category="WanQuant/convert",
            description="Writes a quantized copy of a Wan checkpoint, one tensor at a time. A copy that is already"
            " there and made the same way is reused.",
            search_aliases=["quantize", "gguf", "compress model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "source",
                    options=source_names(),
                    tooltip="A Wan checkpoint: .safetensors, the first of its shards, or .gguf.",
                ),
                encoding.recipe_input(),
                encoding.folder_input(),
                io.String.Input(
                    "output_name",
                    default="",
                    tooltip="Name of the .gguf file; empty: the source's name and the recipe.",
                ),
                encoding.overwrite_input(),
                encoding.effort_input(),
                encoding.device_input(),
                # Those from here on are optional: graphs saved before they were added lack them.
                encoding.target_size_input(),
                encoding.importance_input(
                    "errors go where they count least. With a calibration (.safetensors) they also make up for each"
                    " other."
                ),
                io.String.Input(
                    "importance_path",
                    optional=True,
                    force_input=True,
                    tooltip="Connect the path of Save Importance Matrix; importance is then ignored.",
                ),
                io.Combo.Input(
                    "module",
                    options=[NONE, *source_names()],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="A separate module (VACE and the like) that becomes part of the file.",
                ),
                io.Combo.Input(
                    "patch_embedding",
                    options=[_FLAT, _DEEP],
                    default=_FLAT,
                    optional=True,
                    advanced=True,
                    tooltip="4d is flattened, as llama.cpp's tools need it; 5d is for WanVideoWrapper.",
                ),
                io.MultiCombo.Input(
                    "more_modules",
                    options=source_names(),
                    default=[],
                    optional=True,
                    advanced=True,
                    placeholder="more modules",  # all that the canvas shows of its name
                    tooltip="Further modules that become part of the file, in this order.",
                ),
            ],
            outputs=encoding.report_outputs(),
        )

    @classmethod
    def validate_inputs(
        cls,
        source: str | None = None,
        importance: str | None = NONE,
        importance_path: str | None = "",
        module: str | None = NONE,
        more_modules: Sequence[str] | None = (),
    ) -> bool | str:
        named = [(source_folder(name), name) for name in (source, *_modules(module, more_modules or ()))]
        if importance != NONE and importance_path == "":  # a linked path is None at this point
            named.append((IMPORTANCE, importance))
        return check_names(*named)

    @classmethod
    def fingerprint_inputs(
        cls,
        source: str,
        recipe: str,
        folder: str,
        output_name: str,
        target_size: float = 0.0,
        importance: str = NONE,
        module: str = NONE,
        more_modules: Sequence[str] = (),
        **_: object,
    ) -> str:
        modules = _modules(module, more_modules)
        name = _name(output_name, source, modules, recipe, target_size)
        target = os.path.join(destinations().get(folder, folder), name)
        read = [*((source_folder(file), file) for file in (source, *modules)), (IMPORTANCE, importance)]
        return " ".join((*(stat_token(where, what) for where, what in read), written_token(target)))

    @classmethod
    def execute(
        cls,
        source: str,
        recipe: str,
        folder: str,
        output_name: str,
        overwrite: bool,
        effort: Effort,
        device: str,
        target_size: float = 0.0,
        importance: str = NONE,
        importance_path: str = "",
        module: str = NONE,
        patch_embedding: str = _FLAT,
        more_modules: Sequence[str] = (),
    ) -> io.NodeOutput:
        modules = _modules(module, more_modules)
        name = _name(output_name, source, modules, recipe, target_size)
        target = output_path(destinations()[folder], name, ".gguf")
        if importance != NONE:
            importance_path = importance_path or model_path(IMPORTANCE, importance)
        report = convert(
            model_path(source_folder(source), source),
            target,
            recipe,
            target_size=target_size or None,
            effort=effort,
            importance=encoding.read_importance(importance_path) if importance_path else None,
            device=encoding.encoder_device(device),
            overwrite=overwrite,
            five_d=patch_embedding == _DEEP,
            modules=[model_path(source_folder(file), file) for file in modules],
            progress=encoding.progress_bar(),
        )
        return encoding.shown(report, cls)


def _modules(first: str | None, more: Sequence[str]) -> list[str]:
    """Those chosen, as far as they are known: a linked name is None before it is."""
    return [name for name in (first, *more) if name is not None and name != NONE]


def _name(output_name: str, source: str, modules: Sequence[str], recipe: str, target_size: float) -> str:
    """Of the file to write: the one that was typed, or the source's with what is made of it."""
    added = [os.path.basename(source_stem(module)) for module in modules]
    parts = (source_stem(source), *added, f"{target_size:g}GiB" if target_size else recipe)
    return portable(output_name) or "-".join(parts) + ".gguf"
