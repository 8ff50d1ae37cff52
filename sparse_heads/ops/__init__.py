"""Operators: one folder each, the reference implementation beside the fast ones, `api.py` on top."""
