"""Makes the pack importable as `wanquant` with the root off sys.path, where our `nodes` would shadow the host's."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

package = types.ModuleType("wanquant")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("wanquant", package)
