"""The Save Recovery LoRA node."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io, ui

from ..quant.recovery.recovery_lora import recover
from . import encoding
from .folders import (
    GGUF,
    IMPORTANCE,
    LORAS,
    NONE,
    check_names,
    model_path,
    output_path,
    portable,
    source_folder,
    source_names,
    source_stem,
    stat_token,
    within,
    written_token,
)

_SUFFIX = ".safetensors"
_MIB_PER_GIB = 1024


class WanQuantSaveRecoveryLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantSaveRecoveryLora",
            display_name="Save Recovery LoRA",
            category="WanQuant/convert",
            description="Writes a LoRA that undoes part of a GGUF's quantization error, within a given size. It works"
            " in any LoRA loader, at strength 1.",
            search_aliases=["quality lora", "error lora", "recover quality"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(GGUF),
                    tooltip="The quantized model that the LoRA is for.",
                ),
                io.Combo.Input(
                    "source", options=source_names(), tooltip="The checkpoint that the quantized model was made from."
                ),
                io.Float.Input(
                    "size",
                    default=256.0,
                    min=0.01,
                    max=16384.0,
                    step=0.01,
                    tooltip="Largest size of the file in MiB. Ranks go to the layers where they remove most error.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="Name of the .safetensors file in models/loras. If empty, the model's name and -recovery.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name."),
                encoding.device_input("the arithmetic runs"),
                encoding.importance_input("the errors that matter most are removed first."),
            ],
            # LoRA loaders do not accept a String link for their list.
            outputs=[io.AnyType.Output(display_name="lora_name", tooltip="Connect to lora_name of a LoRA loader.")],
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, source: str | None = None, importance: str | None = NONE
    ) -> bool | str:
        named = [(GGUF, model_name), (source_folder(source), source)]
        if importance != NONE:
            named.append((IMPORTANCE, importance))
        return check_names(*named)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, source: str, name: str, importance: str = NONE, **_: object) -> str:
        read = [(GGUF, model_name), (source_folder(source), source), (IMPORTANCE, importance)]
        target = os.path.join(_folder(), _file_name(name, model_name))
        return " ".join((*(stat_token(folder, file) for folder, file in read), written_token(target)))

    @classmethod
    def execute(
        cls,
        model_name: str,
        source: str,
        size: float,
        name: str,
        overwrite: bool,
        device: str,
        importance: str = NONE,
    ) -> io.NodeOutput:
        name = _file_name(name, model_name)
        matrix = None if importance == NONE else encoding.read_importance(model_path(IMPORTANCE, importance))
        report = recover(
            model_path(GGUF, model_name),
            model_path(source_folder(source), source),
            output_path(_folder(), name, _SUFFIX),
            size / _MIB_PER_GIB,
            importance=matrix,
            device=encoding.encoder_device(device),
            overwrite=overwrite,
            progress=encoding.progress_bar(),
        )
        return io.NodeOutput(os.path.relpath(report.path, _folder()), ui=ui.PreviewText(report.text()))


def _folder() -> str:
    first: str = folder_paths.get_folder_paths(LORAS)[0]
    return first


def _file_name(name: str, model_name: str) -> str:
    return portable(name) or within(_folder(), f"{source_stem(model_name)}-recovery{_SUFFIX}")
