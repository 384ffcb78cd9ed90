"""The options of the command line, which `__main__` gives to its commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from .errors import QuantError
from .plan.recipe import RECIPES
from .publish.request import ALL
from .qtype import Effort
from .sources.baked_lora import LoRA


def add_convert_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a conversion."""
    command.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a .safetensors or .gguf file, a folder of shards, or a quoted pattern such as 'models/*.safetensors'",
    )
    command.add_argument(
        "destination",
        type=Path,
        metavar="DST",
        help="a .gguf or .safetensors file, as the recipe writes it, or a folder, which several files need",
    )
    command.add_argument(
        "--recipe",
        default=["Q4_K_M"],
        type=_recipes,
        metavar="NAME[,NAME...]",
        help=f"the mix of types, one file for each name (default: Q4_K_M); one or more of {', '.join(RECIPES)}",
    )
    command.add_argument(
        "--target-size",
        type=float,
        metavar="GiB",
        help="the largest size of the file in GiB; the types are chosen for the least error at that size; a recipe of"
        " ComfyUI's own formats mixes those that load wherever it does, any other makes a GGUF",
    )
    add_statistics_options(
        command,
        "it moves the error to the input channels that matter least",
        "like --imatrix, and rounding errors are compensated for (GPTQ)",
    )
    command.add_argument(
        "--effort",
        default="best",
        choices=get_args(Effort),
        help="best (default) searches for the least error; fast writes the same bytes as ggml; thorough takes longer"
        " than best for less error, with --calibrate only",
    )
    command.add_argument("--device", default="cpu", help="the device that quantizes: cpu (default), cuda, mps or xpu")
    command.add_argument(
        "--patch-embedding",
        default="4d",
        choices=("4d", "5d"),
        help="dimensions of the patch embedding: 4d (default) as llama.cpp's tools need it, 5d for WanVideoWrapper",
    )
    command.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="write 0 for NaN and infinity in the source, instead of refusing it",
    )
    add_options_of_source(command)
    command.add_argument(
        "--overwrite", action="store_true", help="replace a destination that is another file or another conversion"
    )


def add_publish_options(command: argparse.ArgumentParser) -> None:
    """Add the options of a publication."""
    command.add_argument(
        "sources",
        nargs="+",
        type=Path,
        metavar="SOURCE",
        help="a .safetensors or .gguf file, a folder of shards, or a quoted pattern such as 'models/*.safetensors'",
    )
    command.add_argument(
        "out", type=Path, metavar="OUT", help="the folder for the results, with a folder for each source in it"
    )
    command.add_argument(
        "--recipe",
        required=True,
        type=_all_or_recipes,
        metavar="all|NAME[,NAME...]",
        help=f"all that are not experimental, or one or more of {', '.join(RECIPES)}",
    )
    command.add_argument(
        "--target-size",
        default=[],
        type=_sizes,
        metavar="GiB[,GiB...]",
        help="the largest sizes of the files in GiB, in place of the recipes' own; see convert",
    )
    command.add_argument(
        "--calibrate-from",
        type=Path,
        metavar="FOLDER",
        help="a folder with the calibration STEM.safetensors for each source; see --calibrate of convert",
    )
    command.add_argument(
        "--effort", default="best", choices=get_args(Effort), help="as for convert: best (default), fast or thorough"
    )
    command.add_argument("--device", default="cpu", help="the device that quantizes: cpu (default), cuda, mps or xpu")
    command.add_argument(
        "--allow-non-finite", action="store_true", help="write 0 for NaN and infinity, instead of refusing the source"
    )
    add_options_of_source(command)
    command.add_argument("--overwrite", action="store_true", help="replace files of other conversions")
    group = command.add_mutually_exclusive_group()
    group.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="worker processes (default: as many as cores and memory allow; on a GPU one)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="a Ray cluster in place of worker processes: HOST:PORT, auto or local; its nodes share all folders",
    )
    command.add_argument("--plan", action="store_true", help="print what would be made, and stop")


def add_statistics_options(command: argparse.ArgumentParser, of_imatrix: str, of_calibrate: str) -> None:
    """Add the options whose files tell of the inputs of layers; both texts say what a file does."""
    group = command.add_mutually_exclusive_group()
    kinds = {"imatrix": f"an importance matrix (.gguf or .dat); {of_imatrix}"}
    kinds["calibrate"] = f"a calibration (.safetensors); {of_calibrate}"
    for name, text in kinds.items():
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)


def add_options_of_source(command: argparse.ArgumentParser) -> None:
    """Add the options for what becomes part of a source."""
    command.add_argument(
        "--module",
        action="append",
        default=[],
        type=Path,
        dest="add_ons",
        metavar="FILE",
        help="an add-on file (VACE, ...) that is merged onto the source; repeat the option for more",
    )
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        dest="loras",
        metavar="FILE[:STRENGTH]",
        help="a plain LoRA that is added to the source's weights (strength 1, if none follows the last colon);"
        " repeat the option for more",
    )


def _all_or_recipes(text: str) -> list[str]:
    return list(ALL) if text.lower() == "all" else _recipes(text)


def _sizes(text: str) -> list[float]:
    try:
        return [float(size) for size in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not sizes in GiB: {text!r}; give numbers such as 4.5,8") from None


def _recipes(text: str) -> list[str]:
    names = text.upper().split(",")
    unknown = [name for name in names if name not in RECIPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown recipe {unknown[0]!r}; choose from {', '.join(RECIPES)}")
    return names


def _lora(text: str) -> LoRA:
    try:
        return LoRA.of(text)
    except QuantError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
