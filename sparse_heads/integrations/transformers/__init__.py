"""Attach to transformers models: swap projections for ones that skip heads, score heads."""
