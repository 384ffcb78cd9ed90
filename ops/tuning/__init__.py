"""Tuning of a loaded model: the capture of its blocks' inputs, and its blocks without their weights.

It imports `host`, `packed`, `observed` and `merged_source`.
"""
