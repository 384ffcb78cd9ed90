"""How products with packed weights are computed: exactly, in 8-bit integers, or as is faster here."""

from __future__ import annotations

import comfy.model_management

from ...quant.errors import PrintableLog
from .. import host, host_products
from .int8 import WORTHWHILE_TOKENS, AutoOps, Int8Ops, int8_ops
from .linear import GGUFOps

logger = PrintableLog(__name__)

EXACT, INT8, AUTO = PRECISIONS = ("exact", "int8", "auto")
OPERATIONS: dict[str, type[GGUFOps]] = {EXACT: GGUFOps, INT8: Int8Ops}


def packed_ops(precision: str = EXACT) -> type[GGUFOps]:
    """Return the host's `operations` for a packed model, and log what `auto` chooses and why.

    Args:
        precision: one of `PRECISIONS`. `auto` is `int8` where comfy-kitchen multiplies with a kernel of the device, and
            faster than in 16 bits.

    Raises:
        QuantError: `int8` in a host without products in 8-bit integers.
    """
    if precision == EXACT:
        return GGUFOps
    device = comfy.model_management.get_torch_device()
    backend = host_products.int8_backend(device) if host.has_int8() else ""
    what = f"comfy-kitchen has no 8-bit product of its own for {device.type}"
    if precision == INT8:
        operations = int8_ops()
        if not backend:
            logger.warning("int8: %s, so that this is slower than exact products; choose auto", what)
        return operations
    if not backend:
        logger.info("precision auto: exact, because %s", what if host.has_int8() else "this ComfyUI has no int8")
        return GGUFOps
    if not host_products.int8_can_be_faster(device):
        logger.info("precision auto: exact, because 8-bit products are hardly faster on this GPU")
        return GGUFOps
    logger.info("precision auto: int8 by comfy-kitchen's %s backend, from %d tokens on", backend, WORTHWHILE_TOKENS)
    return AutoOps


def precision_of(operations: object) -> str:
    """Return the precision of a loaded model's `operations` as a word, or that they are ComfyUI's own."""
    by_class: dict[object, str] = {GGUFOps: EXACT, Int8Ops: INT8, AutoOps: AUTO}
    return by_class.get(operations, "ComfyUI's own")
