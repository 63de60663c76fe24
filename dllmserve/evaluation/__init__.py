"""The documented name of :mod:`dllmserve.tools.evaluation`."""

from dllmserve.tools.evaluation import *  # noqa: F403
