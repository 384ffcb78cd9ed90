"""A check of the installation, on a tiny Wan that is made in a temporary folder.

It imports `conversion`, `inspection`, `kernels`, `plan` and `files`.
"""
