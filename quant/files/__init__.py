"""Files in general: written atomically, locked, resumed; headers and tokenizers of other formats.

It imports `errors`.
"""
