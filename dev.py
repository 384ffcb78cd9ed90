"""Development commands: setup | demo | test | bench | serve; `dev.py -h` explains them."""

from __future__ import annotations

import argparse
import ast
import os
import sys
import tempfile
from pathlib import Path

from testing.hosts import DEFAULT_HOST, HOSTS, ROOT, DevError, Host, link_folder, tools
from testing.installation import setup

_MOST_PROCESSES = 4  # of tests; each needs up to 3 GiB
# glibc gives freed memory back to the system, and to get it again takes up to half the time of a test.
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}


def _test(host: Host, pytest_arguments: list[str]) -> int:
    """Run lint, types and all tests; with arguments for pytest, or on another host, only pytest.

    Without arguments, the files of tests are shared out to several processes with one thread each.
    """
    modules = ["pytest", "xdist", "ruff", "mypy", "websocket", "playwright"]
    host.require(modules, f"pip install {' '.join(tools())}")
    if not pytest_arguments and host.version == DEFAULT_HOST:
        lint = [("check", "."), ("format", "--check", ".")]
        if any(host.run("-m", "ruff", *step) for step in lint) or _check_types(host):
            return 1
    os.environ.update(_KEEP_MEMORY)
    if not pytest_arguments:
        if host.version != DEFAULT_HOST:
            pytest_arguments = ["tests/ops", "tests/nodes", "tests/host"]  # the formats do not depend on ComfyUI
        pytest_arguments += ["-n", str(min(_MOST_PROCESSES, os.cpu_count() or 1)), "--dist", "loadfile"]
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    return host.run("-m", "pytest", *pytest_arguments)


def _check_types(host: Host) -> int:
    packages = [f"-pwanquant.{name}" for name in ("quant", "ops", "nodes", "testing")]
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    with tempfile.TemporaryDirectory() as name:
        link_folder(Path(name) / "wanquant", ROOT)
        return host.run("-m", "mypy", *options, *packages, cwd=Path(name))


def _bench(version: str | None, name: str | None, arguments: list[str]) -> int:
    """Run one benchmark; without a name, list them with the first lines of their docstrings."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "bench").glob("*.py"))}
    # Modules without a main function are shared by the benchmarks.
    docs = {stem.replace("_", "-"): ast.get_docstring(ast.parse(t)) for stem, t in texts.items() if "def main(" in t}
    if name in docs:
        return setup(version).run_module(f"bench.{name.replace('-', '_')}", *arguments)
    if name:
        raise DevError(f"there is no benchmark {name!r}: choose one of {', '.join(docs)}")
    for stem, doc in docs.items():
        print(f"{stem:20} {(doc or '').partition(chr(10))[0]}")
    return 0


COMMANDS = {
    "setup": "make .venv and .host/ComfyUI, or check the checkout that COMFYUI_PATH names",
    "demo": "convert, load, sample and decode in a real ComfyUI server; results in out/demo",
    "test": "lint, types and all tests; further arguments go to pytest, which then runs alone",
    "bench": "run one benchmark; without a name, list them",
    "serve": "ComfyUI with the pack, for a browser",
}


def _parse() -> tuple[argparse.Namespace, list[str]]:
    """Return the options, and the arguments that are left for pytest or the benchmark."""
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, text in COMMANDS.items():
        # `bench` passes --help on to the benchmark; without a name it prints the list.
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, add_help=name != "bench")
        command.add_argument("--host", choices=HOSTS, metavar="VERSION", help=f"one of {', '.join(HOSTS)}")
        if name == "bench":
            command.add_argument("name", nargs="?")
        if name == "serve":
            command.add_argument("--port", default="8188")
    options, rest = parser.parse_known_args()
    return (options, rest) if options.command in ("test", "bench") else (parser.parse_args(), [])


def main() -> int:
    options, rest = _parse()
    if options.command == "bench":
        return _bench(options.host, options.name, rest)
    host = setup(options.host)
    if options.command == "test":
        return _test(host, rest)
    if options.command == "demo":
        return host.run_module("bench.demo")
    if options.command == "serve":
        base = str(ROOT / ".host" / f"base-{host.version}")
        return host.run_module("testing.server", "--base", base, "--port", options.port)
    print(f"ComfyUI {host.version} is ready: {host.comfyui}, run by {host.python}")
    return 0


if __name__ == "__main__":
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 - users may start it with an older one
            raise DevError(f"needs Python 3.10 or newer, got {sys.version.split()[0]}: try python3.11 dev.py ...")
        sys.exit(main())
    except DevError as error:
        sys.exit(f"dev.py: {error}")
    except KeyboardInterrupt:
        sys.exit("dev.py: interrupted; run the same command again to continue")
