"""Makes the pack importable as `wanquant` without putting the repository root on sys.path (our `nodes` would shadow the host's)."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

package = types.ModuleType("wanquant")
package.__path__ = [str(ROOT)]
sys.modules["wanquant"] = package
