"""The Convert to Quantized Model node."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from comfy_api.latest import io

from ..quant import QuantError
from ..quant.conversion.convert import convert
from ..quant.conversion.settings import Target
from ..quant.plan.recipe import find_recipe
from ..quant.qtype import Effort
from ..quant.statistics.importance import Importance
from . import encoding
from .folders import (
    IMPORTANCE,
    IMPORTANCE_SUFFIXES,
    NONE,
    check_names,
    destination,
    model_path,
    output_path,
    path_token,
    portable,
    read_path,
    source_folder,
    source_names,
    source_stem,
    stat_token,
    within,
    written_token,
)

_FLAT, _FIVE_D = "4d", "5d"


class WanQuantConvert(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantConvert",
            display_name="Convert to Quantized Model",
            category="WanQuant/convert",
            description="Writes a quantized copy of a Wan checkpoint, one tensor at a time. An existing copy with the"
            " same settings is reused.",
            search_aliases=["quantize", "gguf", "int8", "fp8", "nvfp4", "w4a8", "compress model"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "source",
                    options=source_names(),
                    tooltip="A Wan checkpoint: .safetensors (the first file if it is sharded) or .gguf.",
                ),
                encoding.recipe_input(),
                encoding.folder_input(),
                io.String.Input(
                    "output_name",
                    default="",
                    tooltip="Name of the file; the recipe chooses .gguf or .safetensors. If empty, the name of the"
                    " source and the recipe.",
                ),
                encoding.overwrite_input(),
                encoding.effort_input(),
                encoding.device_input(),
                # The inputs below are optional, because graphs saved before they were added lack them.
                encoding.target_size_input(),
                encoding.importance_input(
                    "errors go where they matter least. With a calibration (.safetensors) they also compensate for"
                    " each other."
                ),
                io.String.Input(
                    "importance_path",
                    optional=True,
                    force_input=True,
                    tooltip="Connect the path of Save Importance Matrix. The importance input is then ignored.",
                ),
                io.Combo.Input(
                    "module",
                    display_name="add_on",
                    options=[NONE, *source_names()],
                    default=NONE,
                    optional=True,
                    advanced=True,
                    tooltip="An add-on file, such as VACE, that becomes part of the model's file.",
                ),
                io.Combo.Input(
                    "patch_embedding",
                    options=[_FLAT, _FIVE_D],
                    default=_FLAT,
                    optional=True,
                    advanced=True,
                    tooltip="4d flattens it, as llama.cpp's tools require. 5d is for WanVideoWrapper.",
                ),
                io.MultiCombo.Input(
                    "more_modules",
                    display_name="more_add_ons",
                    options=source_names(),
                    default=[],
                    optional=True,
                    advanced=True,
                    placeholder="more add-ons",  # the canvas shows this instead of the display name
                    tooltip="Further add-on files that become part of the model's file, in this order.",
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
        try:
            names = (source, *_add_ons(module, () if more_modules is None else more_modules))
            named = [(source_folder(name), name) for name in names]
        except QuantError as error:
            return str(error)
        if importance != NONE and importance_path == "":  # a linked path is still None here
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
        importance_path: str | None = "",
        module: str = NONE,
        more_modules: Sequence[str] = (),
        **_: object,
    ) -> str:
        add_ons = _add_ons(module, more_modules)
        path = destination(folder)
        target = os.path.join(path, _file_name(path, output_name, source, add_ons, recipe, target_size))
        read = [*((source_folder(file), file) for file in (source, *add_ons)), (IMPORTANCE, importance)]
        tokens = [stat_token(where, what) for where, what in read]
        return " ".join((*tokens, path_token(importance_path) if importance_path != "" else "", written_token(target)))

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
        add_ons = _add_ons(module, more_modules)
        path = destination(folder)
        name = _file_name(path, output_name, source, add_ons, recipe, target_size)
        target = output_path(path, name, find_recipe(recipe).suffix)
        if importance != NONE:
            importance_path = importance_path or model_path(IMPORTANCE, importance)
        report = convert(
            model_path(source_folder(source), source),
            target,
            recipe,
            target_size=target_size or None,
            effort=effort,
            importance=_read(importance_path) if importance_path else None,
            device=encoding.encoder_device(device),
            overwrite=overwrite,
            five_d=patch_embedding == _FIVE_D,
            modules=[model_path(source_folder(file), file) for file in add_ons],
            progress=encoding.progress_bar(),
        )
        return encoding.report_output(report, cls, output_name)


def _read(importance_path: str) -> Importance:
    return encoding.read_importance(read_path(importance_path, *IMPORTANCE_SUFFIXES))


def _add_ons(first: str | None, more: Sequence[str]) -> list[str]:
    """Return the chosen add-on files that are known already: during validation a linked name is None.

    Raises:
        QuantError: `more` is not a list.
    """
    if not isinstance(more, list | tuple):
        raise QuantError(f"{more!r:.40} in place of a list of add-on files: choose them from the list")
    return [name for name in (first, *more) if name is not None and name != NONE]


def _file_name(
    folder: str, output_name: str, source: str, add_ons: Sequence[str], recipe: str, target_size: float
) -> str:
    """Return `output_name`, or if it is empty a name made of the source, the add-ons and the recipe or target size."""
    added = [os.path.basename(source_stem(add_on)) for add_on in add_ons]
    target = Target(Path(), recipe, target_size or None)
    parts = (source_stem(source), *added, target.mark)
    return encoding.with_suffix(portable(output_name), target.suffix) or within(folder, "-".join(parts) + target.suffix)
