"""Sparse attention: the public configuration lives in :mod:`dllmserve.sparse.state`."""
