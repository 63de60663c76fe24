"""Triton kernels over the state table; the others are in dllmserve.kernels."""
