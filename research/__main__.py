"""Run one study, in the environment of dev.py: python3 -m research NAME [OPTIONS]."""

from __future__ import annotations

import sys
from pathlib import Path

from testing.hosts import DevError
from testing.installation import setup

STUDIES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in STUDIES:
        print(f"usage: python3 -m research NAME [OPTIONS], where NAME is one of {', '.join(STUDIES)}", file=sys.stderr)
        return 2
    return setup(None).run_module(f"research.{sys.argv[1]}", *sys.argv[2:])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DevError as error:
        sys.exit(f"research: {error}")
