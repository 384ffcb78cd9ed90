"""Decoding blocks fast: one torch operator, and behind it the quickest path that the device has."""
