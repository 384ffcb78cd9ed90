"""Whether a pip that knows nothing but PyPI can install what `dev.py setup` installs; says so in one line.

A machine's own pip may have local wheels, another index or constraints, and hide that nobody else can set up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from testing.hosts import HOSTS, Host, interpreter, requirements

# 23.2 is the first that reads a wheel's metadata without the wheel: PyTorch's with CUDA are 3 GB.
PIP = "pip>=23.2"
# An index without such metadata sends gigabytes, and a broken connection says nothing about the requirements.
TRIES = 3
# Networks with certificates of their own need it.
KEPT = {"PIP_CERT"}


def main() -> int:
    environment = {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    resolved = {}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        python, options = str(interpreter(Path(folder))), ["--no-input", "--disable-pip-version-check", "--quiet"]
        pip = [python, "-m", "pip", *options, "install"]
        subprocess.run([*pip, "--upgrade", PIP], env=environment, check=True)
        for version in HOSTS:
            wanted = requirements(Host.managed(version))
            command = [*pip, "--dry-run", "--ignore-installed", "--report", "-", *wanted]
            for _ in range(TRIES):
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
                if not done.returncode:
                    break
            else:
                print(f"requirements of {version}: cannot be installed from PyPI alone, see above")
                return 1
            items = json.loads(done.stdout)["install"]
            resolved[version] = {item["metadata"]["name"]: item["metadata"]["version"] for item in items}
    packages = resolved[next(iter(HOSTS))]
    print(
        f"requirements of {', '.join(HOSTS)}: can be installed from PyPI alone on Python {sys.version.split()[0]},"
        f" with torch {packages['torch']} and triton {packages.get('triton', 'not at all')}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
