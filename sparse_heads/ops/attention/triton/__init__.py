"""Attention by Triton kernels: the (request, key/value head) pairs that are on, and no other."""
