"""In-projection (q, k, v) and output projection over the kept heads of untouched weights."""
