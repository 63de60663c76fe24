"""A run: settings, one after the other, over the same items and one loaded model."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dllmserve.core.validator import RequestValidator, settled
from dllmserve.errors import ConfigError, DllmServeError, InvalidParameterError, TokenizerError
from dllmserve.sampling_params import SamplingParams
from dllmserve.tools.evaluation.figures import Measured, Outcome, SettingResult, summarise
from dllmserve.tools.evaluation.items import Item
from dllmserve.tools.evaluation.settings import Setting, check_names, named

if TYPE_CHECKING:  # loads torch
    from dllmserve.llm import LLM

#: most items of the batch before each setting that is not timed, and their share of all
WARM_UP, WARM_UP_SHARE = 8, 16


class Evaluation:
    """Items, ready to be answered.

    Args:
        llm: the loaded model.
        items: what it is asked.
        raw: send the prompts as they are, without the chat template.

    Attributes:
        llm: the same.

    Raises:
        ConfigError: there are no items, or one is a conversation and ``raw`` is set.
        TokenizerError: the checkpoint has no tokenizer, or no chat template.
    """

    def __init__(self, llm: LLM, items: Sequence[Item], *, raw: bool = False) -> None:
        if not items:
            raise ConfigError("there are no items to evaluate: give at least one")
        self.llm = llm
        self._items = list(items)
        self._ids = _encode(llm, items, raw)

    def check(self, settings: Sequence[Setting]) -> None:
        """Hold every setting against the engine, before minutes are spent on the first.

        Raises:
            DllmServeError: an item would be refused; the message names setting and item.
        """
        check_names(settings)
        for setting in settings:
            try:
                self._try(setting)
            except DllmServeError as error:
                raise named(error, setting.name) from error

    def fitting(
        self, settings: Sequence[Setting], optional: Collection[str]
    ) -> tuple[list[Setting], list[str]]:
        """The settings without those that mean nothing on this model, and why they are left out.

        Args:
            settings: all of them.
            optional: names of those that may be left out: what the model refuses, or what decodes
                as an earlier one of them does.
        """
        spec, left = self.llm.spec, dict[str, list[str]]()
        kept: list[tuple[Setting, SamplingParams]] = []
        for setting in settings:
            params = settled(setting.on(spec).params(), spec)
            if setting.name in optional:
                same = [f"the same as {other.name!r}" for other, its in kept if its == params]
                if reason := "".join(same[:1]) or self._refusal(setting):
                    left.setdefault(reason, []).append(repr(setting.name))
                    continue
            kept.append((setting, params))
        why = [f"left out {', '.join(names)}: {reason}" for reason, names in left.items()]
        return [setting for setting, _ in kept], why

    def _refusal(self, setting: Setting) -> str:
        """Why the model has no use for a setting; "" if it has."""
        try:
            self._try(setting)
        except InvalidParameterError as error:
            return str(error)
        except DllmServeError as error:  # it asks for more than there is room for
            raise named(error, setting.name) from error
        return ""

    def _try(self, setting: Setting) -> None:
        """Check the longest items. Raises what a request would."""
        llm, setting = self.llm, setting.on(self.llm.spec)
        validator = RequestValidator(
            llm.spec, llm.plan.limits, has_tokenizer=llm.tokenizer is not None
        )
        for place in self._longest():
            item = self._items[place]
            params = setting.params(item.gen_length)
            validator.request(0, self._ids[place], params, name=f"item {item.id!r}")

    def each(
        self,
        settings: Sequence[Setting],
        baseline: str,
        progress: Callable[[str], None] = lambda text: None,
        *,
        use_tqdm: bool = False,
    ) -> Iterator[Measured]:
        """Answer all items with one setting after the other, the baseline first."""
        order = sorted(settings, key=lambda setting: setting.name != baseline)
        for number, setting in enumerate(order, 1):
            progress(f"{setting.name} ({number} of {len(order)})")
            yield self.run(setting, use_tqdm=use_tqdm)

    def run(self, setting: Setting, *, use_tqdm: bool = False) -> Measured:
        """Answer all items at once, after a small batch that is not timed."""
        setting = setting.on(self.llm.spec)
        few = min(WARM_UP, -(-len(self._items) // WARM_UP_SHARE))
        self._generate(setting, few, use_tqdm=False)
        begin = time.perf_counter()
        answers = self._generate(setting, len(self._items), use_tqdm=use_tqdm)
        seconds = time.perf_counter() - begin
        outcomes = [
            Outcome(
                item=item,
                text=answer["text"],
                right=item.is_right(answer["text"]),
                finish_reason=answer["finish_reason"],
                usage=answer["usage"],
            )
            for item, answer in zip(self._items, answers, strict=True)
        ]
        return Measured(setting, outcomes, seconds)

    def _generate(self, setting: Setting, count: int, *, use_tqdm: bool) -> list[dict[str, Any]]:
        lengths = [item.gen_length for item in self._items[:count]]
        params = {length: setting.params(length) for length in set(lengths)}
        chosen = [params[length] for length in lengths]
        return self.llm.generate(self._ids[:count], chosen, use_tqdm=use_tqdm)

    def _longest(self) -> list[int]:
        """Places of the longest prompt for each length of an answer."""
        found: dict[int | None, int] = {}
        for place, item in enumerate(self._items):
            best = found.get(item.gen_length)
            if best is None or len(self._ids[place]) > len(self._ids[best]):
                found[item.gen_length] = place
        return list(found.values())


def evaluate(
    llm: LLM,
    items: Sequence[Item],
    settings: Sequence[Setting],
    *,
    baseline: str | None = None,
    raw: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    use_tqdm: bool = False,
) -> list[SettingResult]:
    """Answer items with every setting, and say what each of them cost.

    Args:
        llm: the loaded model.
        items: what it is asked, from :mod:`dllmserve.tools.evaluation.items`.
        settings: ways of decoding, from :mod:`dllmserve.tools.evaluation.settings`.
        baseline: name of the setting that the others are compared with; None for the first.
        raw: send the prompts as they are, without the chat template.
        progress: told which setting is next.
        use_tqdm: show a progress bar for each.

    Returns:
        One result per setting, in their order.

    Raises:
        DllmServeError: a setting or an item is wrong; nothing has run then.

    Example:
        >>> from dllmserve import LLM  # doctest: +SKIP
        >>> two = [Setting("careful"), Setting("fast", {"unmask": "threshold"})]
        >>> results = evaluate(LLM("tiny"), held_out()[:20], two)  # doctest: +SKIP
    """
    base = find_baseline(settings, baseline)
    evaluation = Evaluation(llm, items, raw=raw)
    evaluation.check(settings)
    measured = evaluation.each(settings, base, progress, use_tqdm=use_tqdm)
    found = {one.setting.name: one for one in measured}
    return summarise([found[setting.name] for setting in settings], base)


def find_baseline(settings: Sequence[Setting], name: str | None) -> str:
    """Name of the baseline; the first setting's unless another one is asked for.

    Raises:
        ConfigError: there is no such setting, or none at all.
    """
    if not settings:
        raise ConfigError("there are no settings to evaluate: give at least one")
    names = [setting.name for setting in settings]
    if name is None:
        return names[0]
    if name not in names:
        listed = ", ".join(map(repr, names))
        raise ConfigError(f"baseline must be one of the settings {listed}, got {name!r}")
    return name


def _encode(llm: LLM, items: Sequence[Item], raw: bool) -> list[list[int]]:
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise TokenizerError(
            f"model {llm.config.model!r} has no tokenizer, so its answers cannot be judged"
        )
    if raw:
        for item in items:
            if len(item.messages) > 1:
                raise ConfigError(
                    f"item {item.id!r} is a conversation, which needs the chat template: "
                    "drop --raw (raw=True)"
                )
        return [tokenizer.encode(item.prompt) for item in items]
    if not tokenizer.has_chat_template:
        raise TokenizerError(
            f"model {llm.config.model!r} has no chat template: send the prompts as they are, "
            "by --raw (raw=True)"
        )
    return [llm.chat_ids(item.messages) for item in items]
