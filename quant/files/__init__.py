"""Files in general: atomic writes, locks and resumption; also headers and tokenizers of other formats.

It imports `errors`.
"""
