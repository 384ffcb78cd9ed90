"""Whole families of files: many sources, many recipes, in several processes or on a cluster.

It imports `conversion`, `inspection`, `statistics`, `plan`, `sources` and `files`.
"""
