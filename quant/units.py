"""Units of memory, in bytes, and numbers with their nouns."""

MIB = 1 << 20
GIB = 1 << 30


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number with what it counts: "1 tensor", "2 tensors".

    Args:
        one: what follows the number 1.
        many: what follows other numbers; by default `one` with an "s".
    """
    return f"{count} {one if count == 1 else many or f'{one}s'}"
