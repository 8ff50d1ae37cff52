"""Which heads to keep: one method a file, each a function of a handle and batches that gives scores [L, H]."""
