"""Fixed schedule: each step writes its quota of the most confident positions."""

from __future__ import annotations

from dllmserve.decoding.rule import RuleView, Update, write_best


class StepsRule:
    """LLaDA's and Dream's rule; the quotas come from :mod:`dllmserve.core.schedule`."""

    def apply(self, view: RuleView) -> Update:
        """Write the ``quota`` best positions of each row."""
        return write_best(view, view.confidence, view.quota)
