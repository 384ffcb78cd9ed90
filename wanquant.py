"""The command line of `python -m quant`, for any folder and any Python: python wanquant.py inspect | convert | ..."""

from __future__ import annotations

import sys
from pathlib import Path

# An embedded or isolated Python (-I, -P) has neither the working directory nor the script's folder on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from quant.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
