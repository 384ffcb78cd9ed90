"""The Load Diffusion Model (Quantized) node."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..ops.loading.native_model import SUFFIX, load_any_model
from ..ops.packed.precision import EXACT, INT8, PRECISIONS
from .folders import (
    GGUF,
    MODELS,
    NONE,
    check_names,
    model_path,
    path_token,
    read_path,
    source_folder,
    source_names,
    stat_token,
)

DTYPES = {"default": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_input() -> io.Combo.Input:
    return io.Combo.Input(
        "compute_dtype",
        options=list(DTYPES),
        default="default",
        advanced=True,
        tooltip="Number format of the arithmetic. default lets ComfyUI choose one for your GPU.",
    )


def precision_input() -> io.Combo.Input:
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=EXACT,
        optional=True,  # because graphs saved before it was added lack it
        advanced=True,
        tooltip="How to multiply. int8: in 8-bit integers, faster on many GPUs, with an error of about 1.4 % in each"
        " layer's output. auto: int8 where the GPU is fast at it, else exact.",
    )


def model_names() -> list[str]:
    """Return the .gguf and then the .safetensors files that can be chosen."""
    native = (name for name in folder_paths.get_filename_list(MODELS) if name.lower().endswith(SUFFIX))
    return [*folder_paths.get_filename_list(GGUF), *native]


def path_input(name: str, replaced: str) -> io.String.Input:
    return io.String.Input(
        name,
        optional=True,
        force_input=True,
        tooltip=f"Connect the path of Convert to Quantized Model to load its file. {replaced} is then ignored.",
    )


def chosen_path(name: str, path: str) -> str:
    """Return the linked path, or that of the chosen file."""
    return read_path(path, ".gguf", SUFFIX) if path else model_path(source_folder(name), name)


class WanQuantLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WanQuantLoader",
            display_name="Load Diffusion Model (Quantized)",
            category="WanQuant/loaders",
            description="Loads a diffusion model from a GGUF, or from a .safetensors in ComfyUI's own formats such as"
            " INT8 and FP8. Its weights stay quantized in memory.",
            search_aliases=["gguf", "unet loader gguf", "load wan", "quantized", "int8", "fp8", "nvfp4", "w4a8"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="A .gguf file in models/diffusion_models, or a .safetensors for ComfyUI's own loader.",
                ),
                dtype_input(),
                path_input("path", "model_name"),
                io.Combo.Input(
                    "module_name",
                    display_name="add_on_name",
                    options=[NONE, *sorted((*folder_paths.get_filename_list(GGUF), *source_names()))],
                    default=NONE,
                    optional=True,  # because graphs saved before it was added lack it
                    advanced=True,
                    tooltip="An add-on file in models/diffusion_models, such as VACE: .gguf, or .safetensors in F32,"
                    " F16 or BF16.",
                ),
                io.Boolean.Input(
                    "int8",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Multiply in 8-bit integers. This is faster on many GPUs, with an error of about 1.4 %"
                    " in each layer's output.",
                ),
                precision_input(),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(
        cls, model_name: str | None = None, path: str | None = "", module_name: str | None = NONE
    ) -> bool | str:
        # A linked path is still None here. It replaces the name, which may then be stale.
        base = [(source_folder(model_name), model_name)] if path == "" else []
        add_on = [] if module_name == NONE else [(_folder(module_name), module_name)]
        return check_names(*base, *add_on)

    @classmethod
    def fingerprint_inputs(
        cls, model_name: str | None = "", path: str | None = "", module_name: str | None = NONE, **_: object
    ) -> str:
        base = stat_token(source_folder(model_name), model_name) if path == "" else path_token(path)
        return f"{base} {stat_token(_folder(module_name), module_name)}"

    @classmethod
    def execute(
        cls,
        model_name: str,
        compute_dtype: str,
        path: str = "",
        module_name: str = NONE,
        int8: bool = False,
        precision: str = EXACT,
    ) -> io.NodeOutput:
        # Graphs saved before `precision` was added have only `int8`.
        precision = INT8 if int8 and precision == EXACT else precision
        add_on = None if module_name == NONE else model_path(_folder(module_name), module_name)
        path = chosen_path(model_name, path)
        return io.NodeOutput(load_any_model(path, dtype=DTYPES[compute_dtype], add_on=add_on, precision=precision))


def _folder(module_name: str | None) -> str:
    return source_folder(module_name) if module_name and module_name != NONE else GGUF
