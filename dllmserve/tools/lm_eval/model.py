"""The model class that lm-eval runs; importing this module registers it as ``dllmserve``."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from dllmserve import __version__
from dllmserve._checks import check_bool, check_int
from dllmserve.errors import InvalidParameterError, PromptError, TokenizerError
from dllmserve.llm import LLM
from dllmserve.tools.environment import dtype_name
from dllmserve.tools.lm_eval.asking import Ask, cut, read_request, split_options
from dllmserve.tools.lm_eval.scoring import greedy_params, moved_spaces, rolling

#: below lm-eval's own, whose level and format it has
log = logging.getLogger("lm_eval.models.dllmserve")

_NO_ROLLING = (
    "this task asks for the log-likelihood of whole texts (loglikelihood_rolling), and a masked "
    "diffusion model bounds that of an answer behind a prompt alone: choose a task of the type "
    "loglikelihood, multiple_choice or generate_until, or an autoregressive model"
)


@register_model("dllmserve")
class DllmServeLM(LM):
    """A diffusion language model in this process.

    Args:
        pretrained, model: local directory, hub id, or "tiny" (the default).
        device: of lm-eval's ``--device``.
        batch_size, max_batch_size: not read: all requests of a call are submitted at once, and
            ``max_num_seqs`` says how many of them run.
        mc_num: samples of a log-likelihood's estimate, see :meth:`dllmserve.LLM.log_likelihood`.
        is_check_greedy: tell whether a continuation is what greedy decoding gives, which takes a
            forward for each of its tokens; if not, it counts as none.
        **options: any field of EngineConfig, and of SamplingParams and SparseConfig as defaults
            of the requests; ``seed`` is the requests', ``engine_seed`` the engine's.

    Example:
        >>> lm = DllmServeLM("tiny", unmask="threshold", threshold=0.9)  # doctest: +SKIP
        >>> lm_eval.simple_evaluate(lm, tasks=["gsm8k"])  # doctest: +SKIP
    """

    def __init__(
        self,
        pretrained: str | None = None,
        model: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        mc_num: int = 128,
        is_check_greedy: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._samples = check_int(InvalidParameterError, "mc_num", mc_num, 1)
        self._checks_greedy = check_bool(InvalidParameterError, "is_check_greedy", is_check_greedy)
        config, self._base = split_options(pretrained, model, device, options)
        self._llm = LLM(**asdict(config))
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise TokenizerError(f"model {config.model!r} has no tokenizer, so it reads no text")
        self._tokenizer = tokenizer
        #: prompts that the chat template wrote, special tokens and all
        self._rendered: set[str] = set()
        self._usage: Counter[str] = Counter()

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer all requests in one batch; each text ends before the first of its ends."""
        made: dict[str, Ask] = {}
        seen: Counter[tuple[str, str]] = Counter()
        prompts, params, asks = [], [], []
        for request in requests:
            context, given = request.args
            key = repr(sorted(given.items()))
            if (ask := made.get(key)) is None:
                ask = made[key] = read_request(given, self._base, self._llm.spec)
            prompts.append(self._encode(context))
            params.append(ask.seeded(context, seen[context, key]))
            asks.append(ask)
            seen[context, key] += 1
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        self._count(outputs, time.perf_counter() - begin)
        texts = [cut(o["text"], ask.until) for o, ask in zip(outputs, asks, strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """How likely continuations are behind their contexts, and which are the greedy ones.

        What it is of a model that is not autoregressive, :meth:`dllmserve.LLM.log_likelihood` says.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        sums = self._score(pairs, disable_tqdm)
        found = list(zip(sums, self._are_greedy(pairs, disable_tqdm), strict=True))
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, one)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """How likely whole texts are, of autoregressive models.

        Raises:
            NotImplementedError: the model is none.
        """
        spec = self._llm.spec
        if spec.geometry != "causal":
            raise NotImplementedError(_NO_ROLLING)
        texts = [self._tokenizer.encode(request.args[0], special=False) for request in requests]
        most = self._llm.plan.limits.max_model_len
        pieces = [list(rolling(ids, self._prefix(), most)) for ids in texts]
        sums = iter(self._score([pair for text in pieces for pair in text], disable_tqdm))
        found = [sum(next(sums) for _ in text) for text in pieces]
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one)
        return found

    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[float]:
        """Log-likelihoods of answers behind prompts."""
        prompts, answers = [before for before, _ in pairs], [ids for _, ids in pairs]
        seed = self._base.sampling.get("seed") or 0
        return self._llm.log_likelihood(
            prompts, answers, self._samples, seed, use_tqdm=not disable_tqdm
        )

    def _are_greedy(
        self, pairs: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> list[bool]:
        """Whether answers are what greedy decoding gives; prompts and lengths are decoded once."""
        if not self._checks_greedy:
            return [False] * len(pairs)
        asked = {(tuple(before), len(ids)): 0 for before, ids in pairs}
        outputs = self._llm.generate(
            [list(before) for before, _ in asked],
            [greedy_params(length, self._llm.spec) for _, length in asked],
            use_tqdm=not disable_tqdm,
        )
        answers = dict(zip(asked, (output["token_ids"] for output in outputs), strict=True))
        return [answers[tuple(before), len(ids)] == ids for before, ids in pairs]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context, and of what follows when both are one text."""
        if context in self._rendered:
            before, whole = self._encode(context), self._encode(context, continuation)
        else:
            context, continuation = moved_spaces(context, continuation)
            before, whole = self._encode(context), self._encode(context, continuation)
        if not before:
            before = [self._prefix()]
            whole = [*before, *whole]
        # a tokenizer may make one token of the border
        rest = whole[len(before) :] or self._tokenizer.encode(continuation, special=False)
        return before, rest

    def _prefix(self) -> int:
        """What stands before a text that has nothing before it."""
        begun = self._tokenizer.encode("")
        ends = self._llm.spec.text_end_ids or self._llm.spec.eos_ids
        for id in (*begun[:1], self._tokenizer.end_id, *ends):
            if id is not None:
                return id
        raise PromptError(
            "a text without a context needs a token before it, and the tokenizer has neither one "
            "that begins texts nor one that ends them"
        )

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt text of a conversation, by the checkpoint's template.

        Args:
            chat_history: messages.
            add_generation_prompt: False leaves the last message, which is the assistant's, open
                for the model to go on with.
        """
        messages, begun = list(chat_history), ""
        if not add_generation_prompt:
            if not messages or messages[-1].get("role") != "assistant":
                raise PromptError("a prompt without a turn of its own must end in the assistant's")
            begun = messages.pop()["content"]
        text = self._tokenizer.render_chat(messages) + begun
        self._rendered.add(text)
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which lm-eval writes down; a checkpoint has one at most."""
        if chat_template is False or not self._tokenizer.has_chat_template:
            return None
        if isinstance(chat_template, str):
            log.warning("the checkpoint has one chat template, not one named %r", chat_template)
        return self._tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        """Model and template, in the names of lm-eval's cached requests."""
        template = (self._tokenizer.chat_template or "").encode()
        name = self._llm.config.model.replace("/", "__")
        return f"{name}-{hashlib.sha256(template).hexdigest()[:12]}"

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the results, beside its own settings."""
        plan, requests = self._llm.plan, max(self._usage["requests"], 1)
        return {
            "dllmserve_version": __version__,
            "model_dtype": dtype_name(plan),
            "model_device": str(plan.device),
            "model_num_parameters": plan.spec.parameters(),
            "decoding": self._base.given(),
            "requests": self._usage["requests"],
            "forward_passes_per_request": self._usage["forward_passes"] / requests,
            "tokens_per_forward": self._usage["completion_tokens"]
            / max(self._usage["forward_passes"], 1),
        }

    def _encode(self, context: str, rest: str = "") -> list[int]:
        """Ids of a prompt, and of more. What a template wrote has its special tokens already."""
        plain = self._tokenizer.encode(context + rest, special=False)
        if context in self._rendered:
            return plain
        whole = self._tokenizer.encode(context + rest)
        added = whole[: len(whole) - len(plain)]
        # a prompt from lm-eval's cache of requests may be a template's too
        return plain if added and plain[: len(added)] == added else whole

    def _count(self, outputs: Sequence[Mapping[str, Any]], seconds: float) -> None:
        if not outputs:
            return
        tokens = sum(o["usage"]["completion_tokens"] for o in outputs)
        forwards = sum(o["usage"]["forward_passes"] for o in outputs)
        self._usage.update(requests=len(outputs), completion_tokens=tokens, forward_passes=forwards)
        log.info(
            "%d answers: %.1f forward passes each, %.2f tokens per forward, %.1f tokens/s",
            len(outputs),
            forwards / len(outputs),
            tokens / max(forwards, 1),
            tokens / max(seconds, 1e-9),
        )
