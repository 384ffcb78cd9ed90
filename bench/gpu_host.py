"""The folder that `gpu_memory.py` needs besides torch, triton and numpy: ComfyUI's source and packages, under 64 MiB.

    python3 dev.py bench gpu-host [FOLDER]        (default: out/gpu-host)

The packages are copied from the running environment. They are pure Python, or compiled for any Python 3 on Linux
(x86-64).
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

HOST = ("comfy", "comfy_execution", "comfyui_version.py", "cuda_malloc.py", "node_helpers.py")
PACKAGES = ("comfy_aimdo", "comfy_kitchen", "gguf", "safetensors", "packaging", "psutil", "einops", "tqdm")
STUBS = ("PIL", "av", "scipy", "tokenizers", "torchaudio", "torchsde", "torchvision", "transformers", "yaml")
LARGEST_MIB = 8
"""The largest compiled module that is copied; comfy_kitchen works without its larger CUDA and HIP libraries."""


def assemble(folder: Path, checkout: Path) -> int:
    """Replace the folder and return its bytes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in HOST:
        _copy(checkout / name, folder)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{name} is not installed in {sys.prefix}: run this with ComfyUI's Python")
        _copy(Path(spec.submodule_search_locations[0]), folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, folder: Path) -> None:
    """Copy a module or package, without its data files and large libraries."""
    for path in [source] if source.is_file() else source.rglob("*"):
        if path.suffix == ".py" or (path.suffix == ".so" and path.stat().st_size < LARGEST_MIB << 20):
            target = folder / path.relative_to(source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


class Stub(types.ModuleType):
    """A module that has a class of any name, which is enough for ComfyUI to import it and to derive classes."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Stubs(MetaPathFinder, Loader):
    """A finder and loader of the stubs and all modules below them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] in STUBS else None

    def create_module(self, spec: ModuleSpec) -> Stub:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def start(folder: Path, *, dynamic: bool) -> None:
    """Make ComfyUI importable from `folder`, as its main.py does; call it before torch is imported.

    Args:
        dynamic: enable dynamic VRAM where the GPU supports it.

    Source: main.py, ComfyUI 0.30.0.
    """
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, Stubs())
    import comfy.cli_args
    import comfy_aimdo.control

    if dynamic:
        comfy_aimdo.control.init(nvml_pressure=True)
    import cuda_malloc  # noqa: F401 (chooses torch's allocator)
    import torch

    gpu = torch.cuda.is_available()
    comfy.cli_args.args.cpu = not gpu
    import comfy.memory_management
    import comfy.model_patcher

    if dynamic and gpu and comfy_aimdo.control.init_devices([0]):
        comfy_aimdo.control.set_log_info()
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True


def main() -> None:
    from ..testing.hosts import checkout

    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=root / "out" / "gpu-host")
    folder = parser.parse_args().folder
    print(f"{folder}: {assemble(folder, checkout()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
