"""The documented name of :mod:`dllmserve.tools.evaluation.settings`."""

from dllmserve.tools.evaluation.settings import *  # noqa: F403
from dllmserve.tools.evaluation.suites import SUITES as SUITES
