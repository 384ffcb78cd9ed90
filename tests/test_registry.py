"""The metadata that the ComfyUI registry and ComfyUI-Manager read, and the archive that is published.

Source: docs.comfy.org/registry/specifications; ComfyUI 0.30.0, comfy_config/config_parser.py.
"""

from __future__ import annotations

import io
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from wanquant.ops.host_version import MINIMUM_HOST
from wanquant.quant.gguf.provenance import VERSION
from wanquant.testing.archive import published
from wanquant.testing.hosts import ROOT
from wanquant.workflow_generators import logo

PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAX_BYTES = 3_000_000


def setting(table: str, key: str) -> str:
    """Return a text value, found by a pattern because Python 3.10 has no tomllib."""
    body = PYPROJECT.partition(f"\n[{table}]\n" if table != "project" else "[project]\n")[2].partition("\n[")[0]
    return re.search(rf'^{key} = "(.+)"$', body, re.MULTILINE)[1]


def test_metadata_is_what_the_registry_takes():
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}[a-z0-9]", setting("project", "name"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", setting("project", "version"))
    assert setting("project", "version") == VERSION
    assert setting("project.urls", "Repository").startswith("https://github.com/")
    assert setting("tool.comfy", "PublisherId") and setting("tool.comfy", "DisplayName")
    assert setting("tool.comfy", "requires-comfyui") == f">={MINIMUM_HOST}"
    assert 'license = { file = "LICENSE" }' in PYPROJECT
    assert f"You need ComfyUI {MINIMUM_HOST.removesuffix('.0')} and Python" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("key", "drawn"), [("Icon", logo.icon()), ("Banner", logo.banner())], ids=["icon", "banner"])
def test_logo_is_the_drawing(key: str, drawn: Image.Image, pytestconfig: pytest.Config):
    """Up to the font of another Pillow."""
    before, _, name = setting("tool.comfy", key).partition("/main/")
    assert before.removeprefix("https://raw.githubusercontent.com/") in setting("project.urls", "Repository")
    if pytestconfig.getoption("update"):
        drawn.save(ROOT / name, optimize=True)
    with Image.open(ROOT / name) as kept:
        assert kept.size == drawn.size and kept.mode == drawn.mode
        assert np.abs(np.asarray(kept, np.float32) - np.asarray(drawn, np.float32)).mean() < 4


def test_logo_has_the_sizes_that_the_registry_takes():
    width, height = logo.icon().size
    assert width == height <= 400, "at most 800 x 400"
    assert logo.BANNER_SIZE[0] * 9 == logo.BANNER_SIZE[1] * 21


@pytest.fixture(scope="module")
def files() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the archive is packed from one")
    return published()


def test_archive_is_small(files: set[str]):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in files:
            file.write(ROOT / name, name)
    assert len(archive.getvalue()) < MAX_BYTES


def test_archive_has_what_a_user_needs_and_nothing_else(files: set[str]):
    tops = {name.partition("/")[0] for name in files}
    code = {"__init__.py", "wanquant.py", "nodes", "ops", "quant", "requirements.txt", "pyproject.toml"}
    shown = {
        "web",
        "locales",
        "docs",
        "workflows",
        "README.md",
        "README.zh.md",
        "CHANGELOG.md",
        "LICENSE",
        "CONTRIBUTING.md",
    }
    assert code | shown - {"CONTRIBUTING.md"} <= tops
    assert tops <= code | shown | {"subgraphs"}
