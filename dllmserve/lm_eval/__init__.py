"""The documented name of :mod:`dllmserve.tools.lm_eval`."""
