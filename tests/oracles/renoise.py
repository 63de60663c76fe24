"""DiffusionGemma's generation, one request at a time and in plain Python.

Source: generation_diffusion_gemma.py of transformers: EntropyBoundSampler,
LinearTemperatureScheduleLogitsProcessor and StableAndConfidentStoppingCriteria.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: ``context, canvas, probabilities of the forward before [C, V] or None -> logits [C, V]``
Think = Callable[[list[int], list[int], Tensor | None], Tensor]
#: ``position of the canvas's first, step -> C ids``; step -1 is what a canvas begins with
Fresh = Callable[[int, int], Sequence[int]]
#: ``tempered logits [C, V], position, step -> C ids``
Draw = Callable[[Tensor, int, int], Sequence[int]]


@dataclass
class Canvases:
    """What came of it: ids, forwards, and of each canvas its forwards."""

    ids: list[int]
    forwards: int
    each: list[int]


def likeliest(z: Tensor, position: int, step: int) -> list[int]:
    """No draw at all."""
    found: list[int] = z.argmax(dim=-1).tolist()
    return found


def renoise(
    think: Think,
    prompt: Sequence[int],
    length: int,
    width: int,
    fresh: Fresh,
    params: Any,
    draw: Draw = likeliest,
    ends: Sequence[int] = (),
) -> Canvases:
    """Fill canvases of ``width`` until ``length`` ids or an end stand behind the prompt.

    Args:
        think: the model.
        params: max_denoising_steps, t_min, t_max, entropy_bound, stability_threshold and
            confidence_threshold.
    """
    ids, counts = list(prompt), list[int]()
    while len(ids) < len(prompt) + length:
        done, forwards = _canvas(think, ids, width, fresh, params, draw)
        counts.append(forwards)
        ids += done
        if set(done) & {*ends}:
            break
    return Canvases(ids[len(prompt) :], sum(counts), counts)


def _canvas(
    think: Think, context: list[int], width: int, fresh: Fresh, params: Any, draw: Draw
) -> tuple[list[int], int]:
    start, most = len(context), params.max_denoising_steps
    canvas, before = list(fresh(start, -1)), None
    history = list[list[int]]()
    for step in range(most):
        left = most - step
        temperature = params.t_min + (params.t_max - params.t_min) * left / most
        z = think(context, canvas, before).double() / temperature
        before = z.softmax(dim=-1)
        entropy = (-(before * before.clamp(min=1e-300).log()).sum(dim=-1)).tolist()
        best = z.argmax(dim=-1).tolist()
        drawn, noise = draw(z, start, step), fresh(start, step)
        spent, kept = 0.0, set[int]()
        for place in sorted(range(width), key=lambda p: entropy[p]):
            if spent <= params.entropy_bound:
                kept.add(place)
            spent += entropy[place]
        canvas = [drawn[p] if p in kept else noise[p] for p in range(width)]
        recent = history[-params.stability_threshold :] if params.stability_threshold else []
        steady = len(recent) == params.stability_threshold and all(c == best for c in recent)
        history.append(best)
        if steady and sum(entropy) / width < params.confidence_threshold:
            break
    return history[-1], len(history)
