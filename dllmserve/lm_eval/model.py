"""The documented name of :mod:`dllmserve.tools.lm_eval.model`; importing it registers the model."""

from dllmserve.tools.lm_eval.model import DllmServeLM as DllmServeLM
