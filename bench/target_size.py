"""Error of each recipe against that of types chosen for the same size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ..quant.conversion.convert import convert
from ..quant.inspection.verify import verify
from ..quant.plan.recipe import RECIPES
from ..quant.plan.wan_shapes import WanSize, transformer_shapes
from ..testing.tiny_wan import write_random_checkpoint
from . import harness
from .harness import GIB

# All layers of a 1.3B model, but narrower, so that the measurement needs minutes instead of hours.
SIZE = WanSize(512, 2048, 30)


def realistic(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw heavy-tailed weights whose columns and tensors differ in scale, as in trained transformers."""
    weight = torch.randn(shape, generator=generator)
    if len(shape) != 2:
        return weight.mul_(0.02)
    degrees = 4 + 12 * float(torch.rand(1, generator=generator))
    chi_square = torch.randn((int(degrees), *shape), generator=generator).square_().mean(0)
    columns = torch.randn(shape[1], generator=generator).mul_(0.3).exp_()
    spread = float(torch.randn(1, generator=generator).mul_(0.3).exp_())
    return weight.div_(chi_square.sqrt_()).mul_(columns).mul_(spread * shape[1] ** -0.5)


def compare(source: Path, recipe: str, effort: str) -> dict[str, object]:
    """Return the MiB and the error of both files: |dequantized - source|^2 over |source|^2, over all tensors."""
    destination = source.with_name("quantized").with_suffix(RECIPES[recipe].suffix)
    rows = {}
    for name, size in ((recipe, None), ("target size", 0.0)):
        size = None if size is None else rows[recipe][0] / GIB
        report = convert(source, destination, recipe, target_size=size, effort=effort, overwrite=True)
        rows[name] = report.nbytes, verify(destination, source).by_role[-1]
    (nbytes, error), (sized_nbytes, sized_error) = rows.values()
    return {
        "recipe": recipe,
        "mib": round(nbytes / 2**20, 2),
        "sized_mib": round(sized_nbytes / 2**20, 2),
        "used": round(sized_nbytes / nbytes, 5),
        "sqnr_db": round(error.sqnr_db, 2),
        "sized_sqnr_db": round(sized_error.sqnr_db, 2),
        "error_ratio": round(sized_error.noise / error.noise, 4),
    }


def main() -> None:
    parser = harness.arguments(__doc__, update=harness.RESULTS / "target-size.json")
    parser.add_argument(
        "--recipes", nargs="+", default=["Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K", "W4A8", "W6A8", "FP8"]
    )
    parser.add_argument("--effort", default="best", choices=["fast", "best"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "wan.safetensors"
        write_random_checkpoint(source, transformer_shapes(SIZE), draw=realistic)
        rows = [compare(source, recipe, options.effort) for recipe in options.recipes]
    result = {"machine": harness.machine(), "effort": options.effort, "rows": rows}
    text = harness.table(list(rows[0]), [list(row.values()) for row in rows])
    harness.conclude(options, result, f"{result['machine']}; effort {options.effort}\n{text}")


if __name__ == "__main__":
    main()
