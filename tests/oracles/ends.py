"""LLaDA `generate`'s two options for the ids that end an answer, as its loop applies them.

`logits_eos_inf` strikes the end of the text out before anything is drawn. `confidence_eos_eot_inf`
writes -inf into two tensors after the proposals are made: the end of the text in the noised logits,
the end of the turn in the clean ones, which confidences come from. Without a temperature both are
one tensor; with one, the noised logits are not read again, so only the turn's end loses.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Ends(NamedTuple):
    """What a request asks for; upstream has one id of each kind."""

    text: tuple[int, ...] = ()
    turn: tuple[int, ...] = ()
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False

    def before(self, z: Tensor) -> Tensor:
        """Logits [..., V] that noise and argmax get."""
        return struck(z, self.text if self.logits_eos_inf else ())

    def lost(self, temperature: float) -> tuple[int, ...]:
        """Ids that confidences know nothing of."""
        if not self.confidence_eos_eot_inf:
            return ()
        return self.turn if temperature > 0 else self.text + self.turn

    def after(self, z: Tensor, temperature: float) -> Tensor:
        """Logits [..., V] whose softmax is the confidence."""
        return struck(z, self.lost(temperature))


NO_ENDS = Ends()


def struck(z: Tensor, ids: tuple[int, ...]) -> Tensor:
    """A copy of logits [..., V] with some ids at -inf."""
    z = z.clone()
    for token in ids:
        z[..., token] = -torch.inf
    return z
