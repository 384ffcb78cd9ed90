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


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import in the file, `from . import x` giving (1, "x")."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, a.name) for a in node.names]
    return found


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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= 300


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
