"""Figures: what a setting scored, with 95 % intervals, and what that cost, beside the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from dllmserve.tools.evaluation.items import Item
from dllmserve.tools.evaluation.settings import Setting


@dataclass(frozen=True)
class Outcome:
    """One answer.

    Attributes:
        item: what was asked.
        text: the answer.
        right: whether it is right.
        finish_reason: "stop" or "length".
        usage: counts of the request, such as forward_passes and completion_tokens.
    """

    item: Item
    text: str
    right: bool
    finish_reason: str
    usage: Mapping[str, int]


@dataclass(frozen=True)
class Measured:
    """All answers of a setting.

    Attributes:
        setting: how they were decoded.
        outcomes: one per item, in the order of the items.
        seconds: wall time of the batch, warm.
    """

    setting: Setting
    outcomes: Sequence[Outcome]
    seconds: float


@dataclass(frozen=True)
class Difference:
    """What the accuracy is above the baseline's, on the same items; shares, not points.

    Attributes:
        value: of the accuracies.
        low, high: its 95 % interval, for paired answers.
        gained: items that are right here and wrong in the baseline.
        lost: items that are wrong here and right in the baseline.
    """

    value: float
    low: float
    high: float
    gained: int
    lost: int


@dataclass(frozen=True)
class Figures:
    """Of some items, decoded in one way.

    Attributes:
        items: how many.
        right: of them.
        accuracy: right over items.
        low, high: 95 % interval of the accuracy (Wilson).
        difference: from the baseline; None for the baseline itself, and without one.
        forwards: forward passes per answer, mean.
        forwards_ratio: over the baseline's; None as for ``difference``.
        tokens_per_forward: answer tokens over forward passes.
        same_text: share of the answers with the baseline's very text; None as above.
        cut: answers that filled ``gen_length`` without an end.
        usage: mean of every count of the requests.
    """

    items: int
    right: int
    accuracy: float
    low: float
    high: float
    difference: Difference | None
    forwards: float
    forwards_ratio: float | None
    tokens_per_forward: float
    same_text: float | None
    cut: int
    usage: Mapping[str, float]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], baseline: Sequence[Outcome] | None) -> Figures:
        """Figures of at least one answer; the baseline's are of the same items, in order."""
        count, right = len(outcomes), sum(o.right for o in outcomes)
        low, high = wilson(right, count)
        usage = _means(outcomes)
        forwards = usage["forward_passes"]
        before = None if baseline is None else _means(baseline)["forward_passes"]
        return cls(
            items=count,
            right=right,
            accuracy=right / count,
            low=low,
            high=high,
            difference=None if baseline is None else _difference(outcomes, baseline),
            forwards=forwards,
            forwards_ratio=None if before is None else forwards / before,
            tokens_per_forward=usage["completion_tokens"] / forwards,
            same_text=None if baseline is None else _same_text(outcomes, baseline),
            cut=sum(o.finish_reason == "length" for o in outcomes),
            usage=usage,
        )


@dataclass(frozen=True)
class SettingResult:
    """A setting and everything that is reported of it.

    Attributes:
        name: of the setting.
        given: its fields, as :func:`dllmserve.tools.evaluation.settings.make_setting` takes them.
        sampling: all SamplingParams of the first item.
        sparse: all fields of its SparseConfig, or None.
        varies: fields of SamplingParams that follow the item: least and greatest value.
        seconds: wall time of the batch, warm.
        tokens_per_second: answer tokens of all items over that time.
        overall: figures of all items.
        tasks: figures of each task.
        right: one character per item, "1" if it was right.
    """

    name: str
    given: Mapping[str, Any]
    sampling: Mapping[str, Any]
    sparse: Mapping[str, Any] | None
    varies: Mapping[str, Sequence[Any]]
    seconds: float
    tokens_per_second: float
    overall: Figures
    tasks: Mapping[str, Figures]
    right: str

    @property
    def rule(self) -> str:
        """The unmask rule."""
        return str(self.sampling["unmask"])

    @property
    def cache(self) -> str:
        """The cache policy, "sparse" included."""
        return str(self.sampling["cache"]) if self.sparse is None else "sparse"

    @classmethod
    def of(cls, measured: Measured, baseline: Measured | None) -> SettingResult:
        """The figures of one setting; ``baseline`` is None for the baseline itself."""
        setting, outcomes = measured.setting, measured.outcomes
        sampling, varies = _sampling(setting, [o.item for o in outcomes])
        tokens = sum(o.usage["completion_tokens"] for o in outcomes)
        return cls(
            name=setting.name,
            given=setting.given(),
            sampling=sampling,
            sparse=sampling["sparse"],
            varies=varies,
            seconds=measured.seconds,
            tokens_per_second=tokens / max(measured.seconds, 1e-9),
            overall=Figures.of(outcomes, None if baseline is None else baseline.outcomes),
            tasks=_tasks(outcomes, None if baseline is None else baseline.outcomes),
            right="".join("01"[o.right] for o in outcomes),
        )


def summarise(measured: Sequence[Measured], baseline: str) -> list[SettingResult]:
    """Figures of every setting, those of the baseline first to compare with.

    Args:
        measured: settings that answered the same items, in the same order.
        baseline: name of one of them; without it nothing is compared.
    """
    base = next((m for m in measured if m.setting.name == baseline), None)
    return [SettingResult.of(m, None if m is base else base) for m in measured]


def _tasks(outcomes: Sequence[Outcome], baseline: Sequence[Outcome] | None) -> dict[str, Figures]:
    places: dict[str, list[int]] = {}
    for place, outcome in enumerate(outcomes):
        places.setdefault(outcome.item.task, []).append(place)
    return {
        task: Figures.of(
            [outcomes[p] for p in own], None if baseline is None else [baseline[p] for p in own]
        )
        for task, own in places.items()
    }


def _means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Mean of every count that all of the answers have."""
    names = [name for name in outcomes[0].usage if all(name in o.usage for o in outcomes)]
    return {name: sum(o.usage[name] for o in outcomes) / len(outcomes) for name in names}


def _difference(outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> Difference:
    pairs = list(zip(outcomes, baseline, strict=True))
    gained = sum(here.right and not there.right for here, there in pairs)
    lost = sum(there.right and not here.right for here, there in pairs)
    low, high = paired_difference(gained, lost, len(pairs))
    return Difference((gained - lost) / len(pairs), low, high, gained, lost)


def _same_text(outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> float:
    pairs = zip(outcomes, baseline, strict=True)
    return sum(here.text == there.text for here, there in pairs) / len(outcomes)


def _sampling(
    setting: Setting, items: Sequence[Item]
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """SamplingParams of the first item, and the bounds of what is not the same for all."""
    lengths = sorted({item.gen_length for item in items}, key=lambda n: n or 0)
    every = [asdict(setting.params(length)) for length in lengths]
    for params in every:
        del params["max_tokens"]  # another name of gen_length
    varies = {}
    for name, first in every[0].items():
        values = [params[name] for params in every]
        if any(value != first for value in values):
            varies[name] = [min(values), max(values)]
    return asdict(setting.params(items[0].gen_length)), varies


#: standard deviations on either side of a normal distribution's mean that hold 95 %
Z95 = NormalDist().inv_cdf(0.975)


def wilson(hits: int, items: int) -> tuple[float, float]:
    """Interval of a share (Wilson, 1927): never empty, and never outside 0 and 1.

    Args:
        hits: items that were right.
        items: all of them, at least one.

    Example:
        >>> low, high = wilson(199, 200)
        >>> f"{low:.3f} to {high:.3f}"
        '0.972 to 0.999'
    """
    share, square = hits / items, Z95 * Z95
    middle = (share + square / (2 * items)) / (1 + square / items)
    spread = math.sqrt(share * (1 - share) / items + square / (4 * items * items))
    half = Z95 * spread / (1 + square / items)
    # the ends are exact where everything or nothing was right, but for rounding
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == items else middle + half)


def paired_difference(gained: int, lost: int, items: int) -> tuple[float, float]:
    """Interval of the difference between two shares, both of the same items.

    Only items on which the two disagree tell them apart, as in McNemar's test. This is the
    normal interval of the paired difference with half an item added to each of the four
    cells (Agresti and Min, 2005). Without that it would be empty where the two never disagree.

    Args:
        gained: items that the second has right and the first wrong.
        lost: items that the first has right and the second wrong.
        items: all items, at least one.

    Example:
        >>> low, high = paired_difference(gained=0, lost=28, items=200)
        >>> f"{100 * low:.1f} to {100 * high:.1f} points"
        '-18.7 to -9.0 points'
    """
    total = items + 2
    middle = (gained - lost) / total
    variance = (gained + lost + 1 - (gained - lost) ** 2 / total) / total**2
    half = Z95 * math.sqrt(variance)
    return max(-1.0, middle - half), min(1.0, middle + half)
