"""The metadata that the ComfyUI registry and ComfyUI-Manager read, and the archive that is published.

Source: docs.comfy.org/registry/specifications; ComfyUI 0.30.0, comfy_config/config_parser.py.
"""

from __future__ import annotations

import io
import re
import subprocess
import zipfile

import pytest

from wanquant.ops.host_version import MINIMUM_HOST
from wanquant.quant.gguf.provenance import VERSION
from wanquant.testing.hosts import ROOT

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
    assert f"ComfyUI {MINIMUM_HOST.removesuffix('.0')}\nor newer" in (ROOT / "README.md").read_text()


def git(*arguments: str) -> set[str]:
    return set(subprocess.check_output(["git", "ls-files", "-z", *arguments], cwd=ROOT, text=True).split("\0")) - {""}


@pytest.fixture(scope="module")
def published() -> set[str]:
    """Return the files that the registry's command line packs: those of git without those in .comfyignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the archive is packed from one")
    tracked = git("--cached", "--others", "--exclude-standard")
    ignored = git("--cached", "--others", "--ignored", "--exclude-from=.comfyignore")
    return {name for name in tracked - ignored if (ROOT / name).is_file()}


def test_archive_is_small(published: set[str]):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in published:
            file.write(ROOT / name, name)
    assert len(archive.getvalue()) < MAX_BYTES


def test_archive_has_what_a_user_needs_and_nothing_else(published: set[str]):
    tops = {name.partition("/")[0] for name in published}
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
