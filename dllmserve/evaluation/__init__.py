"""Evaluation: what settings of decoding cost in answers. Needs no torch until a model runs."""

from __future__ import annotations

from dllmserve.evaluation.figures import Figures, SettingResult
from dllmserve.evaluation.items import Item, held_out, read_items, select
from dllmserve.evaluation.run import evaluate
from dllmserve.evaluation.settings import Setting, make_setting, parse_setting, read_settings, suite
from dllmserve.evaluation.suites import SUITES

__all__ = [
    "SUITES",
    "Figures",
    "Item",
    "Setting",
    "SettingResult",
    "evaluate",
    "held_out",
    "make_setting",
    "parse_setting",
    "read_items",
    "read_settings",
    "select",
    "suite",
]
