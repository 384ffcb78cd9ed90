"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = [path for folder in ("quant", "ops", "nodes") for path in sorted((ROOT / folder).rglob("*.py"))]

HOST = {"comfy", "comfy_api", "comfy_aimdo", "comfy_execution", "comfy_kitchen", "folder_paths", "server"}
LOWER_LAYERS = {"quant": set(), "ops": {"quant"}, "nodes": {"quant", "ops"}}


def imports(path: Path, *, typing: bool = True) -> list[tuple[int, str]]:
    """Return (level, module) of every import in the file; `from . import x` gives (1, "x")."""
    found, tree = [], ast.parse(path.read_text())
    only_typing = {id(inner) for node in ast.walk(tree) if _is_typing(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not typing and id(node) in only_typing:
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, a.name) for a in node.names]
    return found


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_dependencies_point_one_way(path):
    parts = path.relative_to(ROOT).parts
    layer, depth = parts[0], len(parts) - 1
    for level, module in imports(path):
        top = module.split(".")[0]
        if level == 0:
            assert top not in {"quant", "ops", "nodes"}, f"{module}: use a relative import"
            assert layer != "quant" or top not in HOST - {"comfy_kitchen"}, f"{module}: quant never imports the host"
            assert layer == "nodes" or top != "folder_paths", f"{module}: only nodes know the host's folders"
        elif level > depth:
            assert top in LOWER_LAYERS[layer], f"{layer} must not import {module}"


# From the ground up: each imports what stands before it.
FLOORS = {
    "quant": (
        *(
            "errors",
            "units",
            "progress",
            "squares",
            "device",
            "host_process",
            "native",
            "formats",
            "encoders",
            "kernels",
            "qtype",
            "torch_op",
            "files",
        ),
        *("gguf", "safetensors", "sources", "plan", "statistics", "inspection", "conversion"),
        *("tuning", "recovery", "check", "publish", "__init__", "arguments", "__main__"),
    ),
    "ops": (
        *(
            "__init__",
            "host_version",
            "host",
            "host_products",
            "packed",
            "host_check",
            "conditioning",
            "conditioning_cache",
            "latents",
        ),
        *("loading", "encode_prompts", "lean", "budget", "observed", "collect_importance", "merged_source", "tuning"),
        "check",
    ),
}


@pytest.mark.parametrize(
    "path", [path for path in MODULES if "nodes" not in path.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_folders_import_what_stands_below_them(path):
    layer, *inside = path.relative_to(ROOT).with_suffix("").parts
    floors = FLOORS[layer]
    for level, module in imports(path, typing=False):
        if 0 < level <= len(inside):  # within the layer
            target = (*inside[: len(inside) - level], *module.split("."))[0]
            assert floors.index(target) <= floors.index(inside[0]), f"{inside[0]} must not import {target}"


def test_every_folder_says_what_it_is_and_imports():
    for layer, floors in FLOORS.items():
        for folder in (path for path in (ROOT / layer).iterdir() if path.is_dir() and path.name != "__pycache__"):
            assert folder.name in floors
            what, _, may = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "").split("\n")
            assert what.endswith(".") and may.startswith("It imports ")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= (400 if path == SEAMS[0] else 300), "one seam, however much is in it"


SEAMS = (ROOT / "ops" / "host.py", ROOT / "ops" / "host_products.py")
# Private and unstable names of the host, and those that only some of its versions have.
OF_THE_HOST = {
    *("_qdata", "_layout_cls", "_quantized_apply", "_v", "comfy_cast_weights", "cast_bias_weight"),
    *("uncast_bias_weight", "run_every_op", "_eager_input_act", "INPUT_ACT_EAGER", "linear_input_act"),
    *("comfy_force_forward", "aimdo_enabled", "TensorFileSlice", "ModelMMAP", "_comfy_tensor_file_slice"),
    *("_comfy_tensor_mmap_refs", "_comfy_source_path", "dynamic_vbars", "set_watermark_limit", "make_prefetch_queue"),
    *("prefetch_queue_pop", "prefetch_dynamic_vbars", "pause_malloc_graph", "current_weight_patches_uuid"),
    *("model_loaded_weight_memory", "model_offload_buffer_memory", "manual_cast_dtype", "cached_patcher_init"),
    *("LowVramPatch", "weight_lowvram_function", "comfy_attention", "ComfyAttention", "TensorWiseINT8Layout"),
    *("_full_precision_mm", "comfy_force_cast_weights", "layout_type", "quant_format", "input_scale", "_params"),
}


def words(path: Path) -> set[str]:
    """Return names, attributes, imported names, and strings of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            found |= {*node.name.split("."), node.asname}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.relative_to(ROOT).parts[0] != "quant"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_names_of_the_host_are_used_in_one_place(path):
    if path in SEAMS:
        assert {word for seam in SEAMS for word in words(seam)} >= OF_THE_HOST
    else:
        assert not words(path) & OF_THE_HOST, "use it through ops/host.py or ops/host_products.py"


# CONTRIBUTING.md says where and why.
REPLACING = {
    ("ops/packed/patcher.py", "with_packed_patches"),
    ("ops/host.py", "in_place"),
    ("ops/budget/gpu_kernels.py", "use_flash_attention"),
}


def replaces(node: ast.AST) -> bool:
    """Return whether a statement gives an object another class or forward."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Attribute) and target.attr in {"__class__", "forward"} for target in targets)
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        return name == "setattr" or (name == "update" and any(k.arg == "forward" for k in node.keywords))
    return False


def test_instances_are_changed_only_where_contributing_says():
    found = {
        (path.relative_to(ROOT).as_posix(), function.name)
        for path in MODULES
        if path.relative_to(ROOT).parts[0] != "quant"
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef) and any(replaces(node) for node in ast.walk(function))
    }
    assert found == REPLACING
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{name}` (`{path}`)" in contributing for path, name in REPLACING)


def toml_list(name: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text()
    return json.loads(re.search(rf"^{name} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)[1])


# ComfyUI's own, and what is used only where it is installed.
FROM_HOST = HOST | {"PIL", "safetensors", "torch", "typing_extensions"}
OPTIONAL = {"triton"}


def test_every_import_is_declared():
    declared = {re.split(r"[<>=]", dependency)[0] for dependency in toml_list("dependencies")}
    tops = {module.split(".")[0] for path in MODULES for level, module in imports(path) if level == 0}
    assert tops - sys.stdlib_module_names - FROM_HOST - OPTIONAL == declared


def test_requirements_equal_pyproject():
    dependencies = toml_list("dependencies")
    assert dependencies == (ROOT / "requirements.txt").read_text().split()
    assert not any(name.startswith("torch") for name in dependencies), "torch is the host's"


def test_help_page_for_every_node():
    ids = {m for p in (ROOT / "nodes").glob("*.py") for m in re.findall(r'\bnode_id="(\w+)"', p.read_text())}
    assert ids == {page.stem for page in (ROOT / "web" / "docs").glob("*.md")}


def test_help_pages_fit_into_the_panel():
    """ComfyUI shows them in a panel that is 270 pixels wide on a small screen, and cuts tables and long code there."""
    for page in (ROOT / "web" / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert "\n|" not in text, page.name
        assert re.findall(r"`[^` -]{22,}`", text) == [], page.name
