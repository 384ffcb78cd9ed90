"""Pictures by stable-diffusion.cpp from converted files, against that from the unconverted checkpoint.

It needs `pip install stable-diffusion-cpp-python`. The weights of the model, in the shapes of Wan 2.1 1.3B, and of the
VAE are random. The pictures show nothing, but are equal where the weights are.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..quant.conversion.convert import convert
from . import harness
from .convert import write_source

SIZE = "1.3B"
# Runs in a subprocess, because the library may abort. The array has 8 bits per color.
SAMPLE = """
import sys
import numpy as np
from stable_diffusion_cpp import StableDiffusion
model, vae, destination = sys.argv[1:]
model = StableDiffusion(diffusion_model_path=model, vae_path=vae, n_threads=1, vae_decode_only=False)
(frame,) = model.generate_video("", width=64, height=64, video_frames=1, sample_steps=2, cfg_scale=1.0, seed=1)
np.save(destination, np.asarray(frame))
"""


def write_vae(path: Path) -> Path:
    """Write a Wan 2.1 VAE with random weights of the usual scale."""
    from comfy.ldm.wan.vae import WanVAE

    torch.manual_seed(0)
    model = WanVAE(96, 16, [1, 2, 4, 4], 2, [], [False, True, True])
    for name, value in model.state_dict().items():
        fan_in = value[0].numel() if value.dim() > 1 and "gamma" not in name else 0
        value.copy_(torch.randn(value.shape) * fan_in**-0.5 if fan_in else torch.full_like(value, "gamma" in name))
    save_file({name: value.half() for name, value in model.state_dict().items()}, path)
    return path


def sample(model: Path, vae: Path) -> np.ndarray:
    """Sample one picture: float64, (height, width, channels)."""
    frame = model.with_suffix(".npy")
    subprocess.run([sys.executable, "-c", SAMPLE, str(model), str(vae), str(frame)], check=True, capture_output=True)
    return np.load(frame).astype(np.float64)


def measure(source: Path, vae: Path, recipes: list[str]) -> list[dict[str, object]]:
    expected = sample(source, vae)
    rows = []
    for recipe in recipes:
        file = source.with_name(f"{source.stem}-{recipe}.gguf")
        frame = sample(convert(source, file, recipe, effort="fast").path, vae)
        file.unlink()
        error = float(np.square(frame - expected).mean())
        rows.append({"recipe": recipe, "psnr_db": round(10 * np.log10(255**2 / error), 2) if error else "equal"})
    return rows


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--recipes", nargs="+", default=["BF16", "Q8_0", "Q4_0"])
    options = parser.parse_args()
    if importlib.util.find_spec("stable_diffusion_cpp") is None:
        parser.error("stable-diffusion.cpp is missing: run pip install stable-diffusion-cpp-python")
    harness.import_comfyui()
    source = write_source(SIZE, None)
    rows = measure(source, write_vae(source.with_name("vae.safetensors")), options.recipes)
    result = {"machine": harness.machine(), "model": SIZE, "rows": rows}
    text = harness.table(list(rows[0]), [list(row.values()) for row in rows])
    harness.conclude(options, result, f"{result['machine']}; {SIZE}, PSNR of the picture\n{text}")


if __name__ == "__main__":
    main()
