"""The set-up installs, unpacks and refuses the right things; the commands themselves run in continuous integration."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from wanquant.testing import hosts
from wanquant.testing.hosts import ROOT, DevError, Host
from wanquant.testing.installation import run_step, setup, unpack

PIP = [sys.executable, "-m", "pip", "--isolated", "--no-input", "--disable-pip-version-check"]


def requirements(folder, version, *lines):
    (folder / "requirements.txt").write_text("\n".join(lines))
    return hosts.requirements(Host(version, folder, Path(sys.executable)))


def test_requirements_leave_torch_to_the_pins(tmp_path):
    wanted = requirements(tmp_path, "0.24.0", "torch", "torchvision", "torchaudio", "torchsde", "", "#x", "aiohttp>=3")
    assert wanted[:4] == [hosts.TORCH, hosts.TORCHVISION, "torchsde", "aiohttp>=3"]
    assert any(line.startswith("pytest==") for line in wanted)


def test_newer_packages_take_the_place_of_the_hosts_own(tmp_path):
    wanted = requirements(tmp_path, "0.30.0+newest", "comfy-kitchen==0.2.26", "comfy-aimdo==0.4.9", "einops")
    assert [line for line in wanted if line.startswith("comfy-")] == ["comfy-kitchen==0.2.40", "comfy-aimdo==0.6.0"]
    assert "einops" in wanted


def test_tools_are_pinned_but_for_triton():
    """PyTorch for GPUs requires an exact Triton, so that another pin could not be installed with it."""
    assert {line.partition(">=")[0] for line in hosts.tools() if "==" not in line.partition(";")[0]} == {"triton"}


def test_only_the_default_host_has_a_cluster(tmp_path):
    """Its wheel is large, and what a cluster runs is the same on every host."""
    cluster = hosts.tools("ray")
    assert all("ray==" in line for line in cluster) and cluster
    with_ray = [version for version in hosts.HOSTS if set(cluster) & set(requirements(tmp_path, version))]
    assert with_ray == [hosts.DEFAULT_HOST]


def test_unpacks_only_regular_files_of_comfyui(tmp_path):
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("a-1/vendor/ComfyUI/comfy/sd.py", "a-1/vendor/ComfyUI/../../../escaped", "a-1/setup.py"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            tar.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("a-1/vendor/ComfyUI/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    unpack(archive, tmp_path / "out" / "ComfyUI")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out/ComfyUI/comfy/sd.py"]
    assert not (tmp_path / "escaped").exists()


def test_link_follows_a_moved_repository(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        hosts.link_folder(tmp_path / "links" / "pack", tmp_path / name)
    assert (tmp_path / "links" / "pack").samefile(tmp_path / "new")


@pytest.mark.parametrize(
    ("files", "python", "message"),
    [
        ((), None, "no comfyui_version.py"),
        (("comfyui_version.py",), None, "set COMFYUI_PYTHON"),
        (("comfyui_version.py",), "absent/python", "set COMFYUI_PYTHON"),
    ],
    ids=["not a checkout", "no interpreter", "absent interpreter"],
)
def test_refuses_an_unusable_comfyui_path(tmp_path, monkeypatch, files, python, message):
    for name in files:
        (tmp_path / name).write_text('__version__ = "0.30.0"\n')
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PYTHON", raising=False)
    if python:
        monkeypatch.setenv("COMFYUI_PYTHON", python)
    with pytest.raises(DevError, match=message):
        setup(None)


def test_comfyui_path_and_host_exclude_each_other(monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", "anywhere")
    with pytest.raises(DevError, match="leave out --host"):
        setup("0.27.0")


def test_demo_imports_without_a_host_on_the_path():
    code = hosts.RUN_IN_PACKAGE.replace('run_name="__main__"', 'run_name="imported"')
    assert "imported" in code
    command = [sys.executable, "-I", "-c", code, str(ROOT), "wanquant.bench.demo"]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.fixture
def index(tmp_path):
    """Make an index of wanquant-a 1, which requires wanquant-b 1, and wanquant-b 2, and return pip's options for it."""
    for name, version, requires in (("a", 1, "wanquant-b==1"), ("b", 1, ""), ("b", 2, "")):
        stem = f"wanquant_{name}-{version}"
        metadata = f"Metadata-Version: 2.1\nName: wanquant-{name}\nVersion: {version}\n"
        with zipfile.ZipFile(tmp_path / f"{stem}-py3-none-any.whl", "w") as file:
            file.writestr(f"{stem}.dist-info/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
            file.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{stem}.dist-info/RECORD", "")
    (tmp_path / "pinned.txt").write_text(f"wanquant-b==1 --hash=sha256:{'0' * 64}\n")
    return ["--no-index", "--find-links", str(tmp_path), "-d", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["wanquant-a==1", "wanquant-b==2"], "exclude each other"),
        (["wanquant-a==9"], "no such release for Python 3"),
        (["-r", "{folder}/pinned.txt"], "the download is not what was published"),
        (["--no-option"], "run this to see its whole output: "),
    ],
    ids=["conflict", "no release", "changed", "anything else"],
)
def test_failed_step_ends_with_what_to_do(arguments, remedy, index, tmp_path):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(DevError) as error:
        run_step("downloading", [*PIP, "download", *index, *arguments])
    first, *_, last = str(error.value).splitlines()
    assert first == "downloading failed:"
    assert last.startswith("What to do: ")
    assert remedy in last


def test_reports_a_missing_network():
    with pytest.raises(DevError, match=r"What to do: check the network[^\n]*$"):
        run_step("downloading", [*PIP, "download", "--index-url", "http://127.0.0.1:9/", "--retries", "1", "a"])


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk space"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]'))", "PIP_CERT"),
        ("The virtual environment was not created successfully because ensurepip is not available.", "-venv"),
        ("error: subprocess-exited-with-error\nERROR: Failed building wheel for av", "no wheel for Python 3"),
        ("PermissionError: [Errno 13] Permission denied: '.venv'", "may not write there"),
    ],
)
def test_failures_that_a_test_cannot_bring_about(said, remedy):
    """The messages are those of pip 26 and Python's venv."""
    with pytest.raises(DevError) as error:
        run_step("step", [sys.executable, "-c", f"print({said!r}); raise SystemExit(1)"])
    assert remedy in str(error.value).splitlines()[-1]


def test_second_set_up_waits_for_the_first(tmp_path, monkeypatch):
    """Both set-ups would write the same environment."""
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from testing import installation
installation.ROOT = Path(sys.argv[2])
with installation._alone():
    print("alone", flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    start = partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with start() as first, start() as second:
        starts = {first.stdout.readline(), second.stdout.readline()}
        assert starts == {"alone\n", "setup: waiting for another one in this folder\n"}
        for process in (first, second):
            process.stdin.write("\n")
            process.stdin.flush()
        assert {first.wait(60), second.wait(60)} == {0}
