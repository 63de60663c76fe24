"""The documented name of :mod:`dllmserve.tools.evaluation.settings`."""

from dllmserve.tools.evaluation.settings import *  # noqa: F403
