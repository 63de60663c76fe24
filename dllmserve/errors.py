"""Every error that dllmserve raises on purpose.

::

    DllmServeError
    ├── InvalidRequestError    (ValueError)         a request that is wrong in itself
    │   ├── InvalidParameterError                   a bad SamplingParams or SparseConfig field
    │   ├── PromptError                             an empty prompt, ids outside the vocabulary
    │   ├── DecisionError                           the input or a question of a decision
    │   └── ContextLengthError                      prompt + answer over max_model_len
    ├── CapacityError          (ValueError)         a valid request that this engine can never fit
    ├── UnknownOptionError     (TypeError)          a keyword that nothing reads
    ├── ConfigError            (ValueError)         a bad engine option
    ├── ModelError
    │   ├── ModelNotFoundError (FileNotFoundError)  no such directory, name or hub id
    │   ├── UnsupportedModelError (ValueError)      an architecture we do not run
    │   ├── WeightsError       (ValueError)         missing, misshapen or truncated tensors
    │   └── TokenizerError     (ValueError)         no tokenizer, no chat template
    ├── OutOfMemoryError       (MemoryError)        the device ran out of memory
    ├── OverloadedError        (RuntimeError)       the server takes no more work now
    │   └── QuotaError                              it takes no more of this caller now
    ├── DeadlineError          (TimeoutError)       the request took too long
    ├── JobStoreError          (RuntimeError)       the store of jobs and results failed
    └── EngineError            (RuntimeError)       the engine failed, not the request
        ├── EngineStartError                        the engine process did not get ready
        ├── EngineDiedError                         it died with the request, which is not run again
        ├── RankError                               a rank of several devices is gone
        └── RequestAbortedError                     somebody dropped the request

Each class also derives from the built-in exception that Python users expect, so
``except ValueError`` keeps working. ``code`` is stable and meant for machines;
``http_status`` is what a server answers.
"""

from __future__ import annotations

from collections.abc import Iterable


class DllmServeError(Exception):
    """Base class of all errors raised on purpose by dllmserve."""

    code: str = "error"
    http_status: int = 500

    def __init_subclass__(cls, *, code: str = "", http_status: int = 0) -> None:
        super().__init_subclass__()
        cls.code, cls.http_status = code or cls.code, http_status or cls.http_status


class InvalidRequestError(DllmServeError, ValueError, code="invalid_request", http_status=400):
    """A request that no engine could run."""


class InvalidParameterError(InvalidRequestError, code="invalid_parameter"):
    """A field of SamplingParams or SparseConfig has a wrong value or type."""


class PromptError(InvalidRequestError, code="invalid_prompt"):
    """The prompt is empty, of the wrong type, or has ids outside the vocabulary."""


class DecisionError(InvalidRequestError, code="invalid_decision"):
    """The input or a question of a decision is wrong; ``param`` is its place, as in the message."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(InvalidRequestError, code="context_length_exceeded"):
    """Prompt plus gen_length is longer than max_model_len."""


class CapacityError(DllmServeError, ValueError, code="capacity_exceeded", http_status=400):
    """A valid request that this engine, as configured, can never hold."""


class UnknownOptionError(DllmServeError, TypeError, code="unknown_option", http_status=400):
    """A keyword argument that nothing reads."""


class ConfigError(DllmServeError, ValueError, code="invalid_config"):
    """An engine option has a wrong value or type."""


class ModelError(DllmServeError, code="model_error"):
    """The model cannot be loaded."""


class ModelNotFoundError(ModelError, FileNotFoundError, code="model_not_found", http_status=404):
    """There is no model under that name or path."""


class UnsupportedModelError(ModelError, ValueError, code="unsupported_model"):
    """The checkpoint's architecture or one of its options is not supported."""


class WeightsError(ModelError, ValueError, code="invalid_weights"):
    """The checkpoint's tensors do not match its config.json."""


class TokenizerError(ModelError, ValueError, code="tokenizer_error"):
    """Text was given (or asked for) but the checkpoint has no usable tokenizer."""


class OutOfMemoryError(DllmServeError, MemoryError, code="out_of_memory", http_status=503):
    """The device ran out of memory. The message says what to change."""


class OverloadedError(DllmServeError, RuntimeError, code="overloaded", http_status=503):
    """The server takes no more work now; ``retry_after`` says in how many seconds it may."""

    def __init__(self, message: str, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QuotaError(OverloadedError, code="share_exceeded", http_status=429):
    """A caller has as much of the server as one may have; ``retry_after`` says when to try again.

    Others are still served. ``code`` says which limit it is: "share_exceeded" (room is left for
    others), "too_many_parallel_requests" or "rate_limit_exceeded".
    """

    def __init__(self, message: str, retry_after: int = 1, *, code: str = "share_exceeded") -> None:
        super().__init__(message, retry_after)
        self.code = code


class DeadlineError(DllmServeError, TimeoutError, code="deadline_exceeded", http_status=504):
    """The request was not finished, or not even started, in the time it had."""


class JobStoreError(DllmServeError, RuntimeError, code="job_store_error", http_status=503):
    """The store of jobs and results failed, by a full disk for instance; it may recover."""


class EngineError(DllmServeError, RuntimeError, code="engine_error"):
    """The engine itself failed; the request may be fine."""


class EngineStartError(EngineError, code="engine_start_failed"):
    """The engine process could not be started, or did not get ready."""


class EngineDiedError(EngineError, code="engine_died"):
    """The engine process died or hung while it ran the request, which was not run again.

    Either a part of the answer had been given out, or the engine died once more with it.
    """


class RankError(EngineError, code="rank_failed"):
    """A rank of an engine on several devices is gone; the engine is over.

    Attributes:
        killed: it was ended, or stopped, from outside.
        stopped: a signal had stopped it.
    """

    def __init__(self, message: str, killed: bool = False, stopped: bool = False) -> None:
        super().__init__(message)
        self.killed, self.stopped = killed, stopped


class RequestAbortedError(EngineError, code="request_aborted", http_status=503):
    """The request was dropped before it was finished."""


def error_named(name: str, message: str) -> DllmServeError:
    """The error of this module with that name, as another process reports it, or an EngineError."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, DllmServeError):
        return kind(message)
    return EngineError(message)


def unknown_option(owner: str, name: str, known: Iterable[str]) -> UnknownOptionError:
    """Build the error for an unknown keyword, with what was probably meant.

    Example:
        >>> str(unknown_option("LLM", "max_len", ["max_model_len", "dtype"]))
        "LLM got an unknown option 'max_len'; did you mean 'max_model_len'?"
    """
    from dllmserve.foreign import advice  # a large table, which nobody needs who makes no mistake

    names = sorted(known)
    hint = advice(name, names) or f"known options: {', '.join(names)}"
    return UnknownOptionError(f"{owner} got an unknown option {name!r}; {hint}")
