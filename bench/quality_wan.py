"""What quantization costs a real Wan: the same prompts and seeds with every file, sampled by ComfyUI in this process.

    python3 dev.py bench quality-wan --model wan2.1_t2v_14B_bf16.safetensors --recipes Q8_0,Q4_K_M,W4A8 \\
        --text-encoder umt5_xxl_fp16.safetensors --prompts "a cat on a boat" "rain at night" \\
        --negative "blurry, static" --seeds 0 1 --vae wan_2.1_vae.safetensors

Every video is a job whose result is kept, so that the same command goes on after a kill, and one with more recipes,
prompts or seeds measures only what is new. Latents and frames are compared with those of the unquantized model.
`--plan` says what it takes. Without `--model` it runs on TinyWan, with its size and steps.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..quant import QuantError
from ..quant.publish.plan import Plan, make_plan
from ..quant.publish.request import Request
from ..quant.publish.run import publish
from . import harness
from .harness import GIB, ROOT, Row

if TYPE_CHECKING:
    from .wan.jobs import Bench
    from .wan.sampling import Settings

TINYWAN = ROOT / "bench" / "tinywan"
CAPTION = "+".join(str(TINYWAN / "words" / f"{word}.safetensors") for word in ("red", "ball", "right"))
# Wan's own recommendation for text to video, and what TinyWan was trained for.
LARGE = {"size": "832x480", "frames": 81, "steps": 30, "cfg": 6.0}
TINY = {"size": "128x128", "frames": 17, "steps": 8, "cfg": 1.0}


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the settings of the videos.

    Raises:
        SystemExit: a file that is not there, a size that is not WIDTHxHEIGHT, no step, or a guidance without a
            negative prompt.
    """
    from .wan.sampling import Settings

    for path in (options.model, options.vae, options.text_encoder, *options.files):
        if path and not path.is_file():
            raise SystemExit(f"{path}: no such file; name one that is there")
    width, _, height = options.size.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise SystemExit(f"--size {options.size}: expected WIDTHxHEIGHT in pixels, such as 832x480; choose such a size")
    if options.steps < 1:
        raise SystemExit(f"--steps {options.steps}: expected at least 1; choose a larger number")
    if options.cfg != 1 and not options.negative:
        raise SystemExit(f"--cfg {options.cfg:g}: needs a negative prompt; add --negative, or choose --cfg 1")
    given = {name: getattr(options, name) for name in ("frames", "steps", "cfg", "sampler", "scheduler", "vae")}
    return Settings(int(width), int(height), negative=options.negative if options.cfg != 1 else "", **given)


def files_of(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Make the files of all recipes, and return them by name, after the unquantized model.

    Raises:
        SystemExit: a file cannot be made.
    """
    from .wan.jobs import UNQUANTIZED

    made = publish(Request([options.model], folder, options.recipes), on_plan=_show)
    if not made.ok:
        raise SystemExit(made.text())
    names = [*options.recipes, *(path.stem for path in options.files)]
    paths = [*(result.destination for result in made.results), *options.files]
    return {UNQUANTIZED: options.model, **dict(zip(names, paths, strict=True))}


def _show(plan: Plan) -> None:
    print(plan.text(), file=sys.stderr)


def plan_of(options: argparse.Namespace, settings: Settings, folder: Path) -> str:
    """Return the bytes and the time of the files, and of the videos by the arithmetic of a forward."""
    videos = len(options.prompts) * len(options.seeds)
    count = videos * (1 + len(options.recipes) + len(options.files))
    flops, rate = flops_of(options.model, settings), products_a_second()
    # Three bytes for a pixel of a frame, and about a quarter for its part of the latent.
    reference = 3.25 * settings.width * settings.height * settings.frames / GIB
    return (
        f"{make_plan(Request([options.model], folder, options.recipes)).text()}\n"
        f"references: about {videos * reference:.2f} GiB for {videos} videos\n"
        f"sampling: {count} videos of {settings.forwards} forwards, {flops / 1e12:.3g} TFLOP each; at the"
        f" {rate / 1e12:.3g} TFLOP/s of a product here about {count * settings.forwards * flops / rate / 3600:,.1f} h\n"
        "Decoding, and weights that do not fit on the GPU, take longer."
    )


def flops_of(model: Path, settings: Settings) -> int:
    """Return the floating-point operations of a forward, counted on tensors without data."""
    from ..ops.budget.meta_wan import meta_model
    from ..ops.budget.simulator import Simulator
    from ..quant.plan.recipe import find_recipe, plan_types
    from ..quant.sources.checkpoint import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
        types: Any = plan_types(find_recipe("F16"), checkpoint.tensors).types
    meta = meta_model(shapes, types)
    # The prompts have the same shape, and are counted once.
    return Simulator(meta, weight_bytes=0).run(settings.job(meta.latent_format.latent_channels), None).now.flops


def products_a_second() -> float:
    """Return the floating-point operations per second of a large product on this machine."""
    on_gpu = torch.cuda.is_available()
    side = 8192 if on_gpu else 1024
    matrix = torch.ones(side, side, device="cuda", dtype=torch.bfloat16) if on_gpu else torch.ones(side, side)

    def product() -> None:
        (matrix @ matrix)[0, 0].item()

    return 2 * side**3 / (harness.fastest(1, product)[0] / 1e3)


def measure(options: argparse.Namespace, settings: Settings) -> tuple[Bench, list[Row]]:
    """Make the files, sample all videos that are missing, and return the measurement and its results."""
    from .wan.jobs import Bench
    from .wan.sampling import conditionings

    folder = options.out
    files = files_of(options, folder / "files")
    bench = Bench(folder, settings, files, options.prompts, options.seeds)
    prompts = [*options.prompts, *([settings.negative] if settings.negative else [])]
    with torch.inference_mode():  # as ComfyUI runs nodes
        return bench, bench.run(conditionings(prompts, options.text_encoder, folder / "prompts"))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options, with the defaults of the model.

    Raises:
        SystemExit: a model without prompts.
    """
    parser = harness.arguments(__doc__)
    parser.add_argument("--model", type=Path, default=TINYWAN / "tinywan.safetensors", help="the unquantized model")
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=["Q8_0", "Q4_K_M"], metavar="A,B")
    parser.add_argument("--files", type=Path, nargs="+", default=[], help="further files of the same model")
    parser.add_argument("--prompts", nargs="+", help="texts, or files of Save Conditioning, joined by +")
    parser.add_argument("--negative", default="", help="the same, for a --cfg other than 1")
    parser.add_argument("--text-encoder", type=Path, help="for texts; safetensors or GGUF")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--vae", type=Path, help="without one, pictures are previews of the latent")
    parser.add_argument("--size", help=f"pixels (default: {LARGE['size']}; TinyWan: {TINY['size']})")
    parser.add_argument("--frames", type=int, help=f"(default: {LARGE['frames']}; TinyWan: {TINY['frames']})")
    parser.add_argument("--steps", type=int, help=f"(default: {LARGE['steps']}; TinyWan: {TINY['steps']})")
    parser.add_argument("--cfg", type=float, help=f"(default: {LARGE['cfg']}; TinyWan: {TINY['cfg']})")
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="simple")
    parser.add_argument("--out", type=Path, help="(default: out/quality-wan/ and the name of the model)")
    parser.add_argument("--plan", action="store_true", help="only say how much time and disk it takes")
    options = parser.parse_args(arguments)
    is_tiny = options.model == parser.get_default("model")
    for name, value in (TINY if is_tiny else LARGE).items():
        setattr(options, name, value if getattr(options, name) is None else getattr(options, name))
    options.out = options.out or ROOT / "out" / "quality-wan" / options.model.stem
    options.prompts = options.prompts or ([CAPTION] if is_tiny else [])
    if not options.prompts:
        raise SystemExit(f"{options.model}: has no prompts; add --prompts with texts or files of Save Conditioning")
    return options


def main() -> None:
    options = parse()
    harness.import_comfyui(cpu=not torch.cuda.is_available())
    try:
        settings = settings_of(options)
        if options.plan:
            print(plan_of(options, settings, options.out / "files"))
            return
        bench, rows = measure(options, settings)
    except QuantError as error:
        raise SystemExit(str(error)) from None
    from .wan.page import text_of, write_page

    page = write_page(bench, rows, shlex.join(["dev.py", "bench", "quality-wan", *sys.argv[1:]]))
    harness.conclude(options, {"settings": settings.json(), "rows": rows}, f"{text_of(rows)}\n\nwritten to {page}")


if __name__ == "__main__":
    main()
