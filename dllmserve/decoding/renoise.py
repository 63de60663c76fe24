"""Renoise: a canvas of noise, of which each forward keeps what is sure and redraws the rest.

Source: DiffusionGemma's EntropyBoundSampler and StableAndConfidentStoppingCriteria (transformers);
SGLang has it as Gemma4Renoise.
"""

from __future__ import annotations

import torch

from dllmserve.decoding.entropy import within_bound
from dllmserve.decoding.rule import Memory, RuleView, Update, rank_of


class RenoiseRule:
    """Draw every position, keep the draws that the entropy bound lets pass, redraw the others.

    Nothing is kept for good: each forward decides anew what it keeps. The canvas is written, all of
    it and with the likeliest tokens, when these were the same in the last ``stability_threshold``
    forwards and the mean entropy is below ``confidence_threshold``; or in the last of
    ``max_denoising_steps`` forwards.

    It remembers of a request in how many forwards on end the likeliest tokens have not changed, and
    of each position the likeliest token.
    """

    def apply(self, view: RuleView) -> Update:
        """Keep, redraw, and write all or nothing."""
        canvas, memory, entropy = view.canvas, view.memory, view.entropy
        if canvas is None or memory is None or entropy is None:
            raise ValueError("the renoise rule needs canvases of noise, entropies and a memory")
        open_ = view.eligible
        count = within_bound(entropy, view.parameter("entropy_bound"))
        kept = rank_of(-entropy) < count[:, None]
        same = ((memory.cells == view.tokens) | ~open_).all(dim=-1)
        steady = torch.where(same, memory.row + 1, 0.0)
        mean = torch.where(open_, entropy, 0.0).sum(dim=-1) / open_.sum(dim=-1).clamp(min=1)
        sure = steady >= view.parameter("stability_threshold")[:, 0]
        sure &= mean < view.parameter("confidence_threshold")[:, 0]
        last = canvas.step + 1 >= view.parameter("max_denoising_steps")[:, 0]
        return Update(
            tokens=view.tokens,
            write=open_ & (sure | last)[:, None],
            memory=Memory(steady, view.tokens.double()),
            draft=torch.where(kept, canvas.drawn, canvas.noise),
        )
