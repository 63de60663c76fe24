"""The documented names of :mod:`dllmserve.tools.bench`."""
