"""What a GPU run measures: correctness first, then headline cases, then the grid in slices. See `__main__.py`."""
