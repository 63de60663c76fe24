"""Evaluation: what settings of decoding cost in answers. Needs no torch until a model runs."""

from __future__ import annotations

from dllmserve.tools.evaluation.figures import Figures, SettingResult
from dllmserve.tools.evaluation.items import Item, held_out, read_items, select
from dllmserve.tools.evaluation.run import evaluate
from dllmserve.tools.evaluation.settings import (
    SUITES,
    Setting,
    make_setting,
    parse_setting,
    read_settings,
    suite,
)

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
