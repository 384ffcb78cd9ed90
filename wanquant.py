"""`python wanquant.py inspect | convert | ...`: what `python -m quant` does, from any folder and any Python."""

from __future__ import annotations

import sys
from pathlib import Path

# An embedded or isolated Python (-I, -P) puts neither the working directory nor the script's folder here.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from quant.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
