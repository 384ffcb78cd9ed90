"""The pack as a user installs it: cloned into custom_nodes under any name, its requirements by pip."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from wanquant.testing.hosts import ROOT, checkout
from wanquant.testing.server import HostServer
from wanquant.tests.host.test_server import NODES

pytestmark = pytest.mark.host

# Without spaces and accents: the host serves no web files from folders of such names.
FOLDER = "My-nodes_v2.1"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostServer]:
    if not checkout().is_dir() or not (ROOT / ".git").exists():
        pytest.skip("needs a ComfyUI and a git checkout of the pack")
    base = tmp_path_factory.mktemp("installed")
    clone = base / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    # Without an index: ComfyUI's environment has it all, and a test must not change what the others run in.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "-r", str(clone / "requirements.txt")]
    subprocess.run(pip, check=True)
    with HostServer(base / "comfyui", folder=FOLDER, pack=clone, log=base / "comfyui.log") as running:
        yield running


def test_loads_with_all_that_it_shows(installed: HostServer):
    assert "IMPORT FAILED" not in installed.log.read_text()
    assert set(NODES) <= set(installed.get("/object_info"))
    for name in NODES:
        page = installed.fetch(f"/extensions/{FOLDER}/docs/{name}.md").decode()
        for picture in (line.partition("](")[2].partition(")")[0] for line in page.splitlines() if "![" in line):
            assert installed.fetch(f"/extensions/{FOLDER}/docs/{picture}").startswith((b"\x89PNG", b"\xff\xd8"))


def test_templates_and_languages_are_found(installed: HostServer):
    assert installed.get("/workflow_templates")[FOLDER]
    languages = installed.get("/i18n")
    assert {"en", "zh", "ja", "ko"} <= languages.keys()
    assert set(NODES) <= languages["zh"]["nodeDefs"].keys()
