"""Files -> the host's models.

It imports `packed`, `host` and `quant`.
"""
