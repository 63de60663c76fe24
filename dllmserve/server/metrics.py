"""Metrics: what the server tells Prometheus, with the names and buckets that others use.

Names are vLLM's, behind the prefix ``dllmserve:``; docs/metrics.md explains each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from dllmserve.process.messages import Counters
from dllmserve.server.http.slots import DROPS, ConnectionStats

PREFIX = "dllmserve:"
#: edges in seconds, as vLLM has them
FIRST_TEXT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)
HTTP_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0)


@dataclass(frozen=True)
class EngineGauges:
    """How one of the engines stands.

    Attributes:
        up: whether it is ready.
        running: requests that take part in its forward passes.
        work: outstanding work of the requests that it was given.
        restarts: engines started in its place after the first.
    """

    up: bool
    running: int
    work: int
    restarts: int


@dataclass(frozen=True)
class Gauges:
    """What is read when Prometheus asks.

    Attributes:
        engine: the engines' counters together.
        engines: each of them; its index is the label ``engine``.
        waiting, running: requests.
        work: outstanding work, tokens that are expected to be computed.
        results, result_bytes: stored results.
        evicted: results dropped, by reason.
        restarts: engines started after the first.
        ready: whether requests are taken.
        connections: of the HTTP server.
    """

    engine: Counters
    engines: Sequence[EngineGauges]
    waiting: int
    running: int
    work: int
    results: int
    result_bytes: int
    evicted: dict[str, int]
    restarts: int
    ready: bool
    connections: ConnectionStats


class Metrics:
    """Counters and histograms of one server.

    Args:
        model: the label ``model_name``.
        compat: "vllm" also exports the gauges that its routers read, under its names.
    """

    def __init__(self, model: str, compat: str) -> None:
        # one more series for each, which nothing reads
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._model = model
        self._compat = compat
        labels = ("model_name",)

        def counter(name: str, text: str, *more: str) -> Counter:
            found = Counter(PREFIX + name, text, (*labels, *more), registry=self.registry)
            return found

        self._success = counter("request_success", "Requests finished.", "finished_reason")
        self._failure = counter("request_failure", "Requests failed.", "reason")
        self._aborted = counter("requests_aborted", "Requests dropped.", "reason")
        self._rejected = counter("admission_rejections", "Requests refused.", "reason")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens taken.").labels(model)
        self._answer_tokens = counter("generation_tokens", "Answer tokens given.").labels(model)
        self._edits = counter("edited_tokens", "Written tokens that were replaced.").labels(model)
        self._http = Counter(
            PREFIX + "http_requests",
            "HTTP requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._http_time = Histogram(
            PREFIX + "http_request_duration_seconds",
            "HTTP requests, to the end of the response.",
            ("method", "route"),
            registry=self.registry,
            buckets=HTTP_BUCKETS,
        )
        self._make_histograms(model)

    def _make_histograms(self, model: str) -> None:
        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            found = Histogram(
                PREFIX + name,
                text,
                ("model_name",),
                registry=self.registry,
                buckets=tuple(buckets),
            )
            return found.labels(model)

        self.first_text = histogram(
            "time_to_first_token_seconds",
            "From arrival to the first committed text (streams only).",
            FIRST_TEXT_BUCKETS,
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds",
            "Between pieces of committed text, per token of the later piece (streams only).",
            TOKEN_BUCKETS,
        )
        self.total = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", REQUEST_BUCKETS
        )
        self.queue = histogram(
            "request_queue_time_seconds",
            "From arrival to the first forward pass.",
            REQUEST_BUCKETS,
        )
        self.inference = histogram(
            "request_inference_time_seconds",
            "From the first forward pass to the end.",
            REQUEST_BUCKETS,
        )
        self.prompt_size = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", COUNT_BUCKETS
        )
        self.answer_size = histogram(
            "request_generation_tokens", "Answer tokens of a request.", COUNT_BUCKETS
        )
        self.asked_size = histogram(
            "request_params_max_tokens", "gen_length of a request.", COUNT_BUCKETS
        )
        self.steps = histogram(
            "request_denoising_steps", "Forward passes of a request.", COUNT_BUCKETS
        )

    def accepted(self, prompt_tokens: int, gen_length: int) -> None:
        """A request was taken."""
        self._prompt_tokens.inc(prompt_tokens)
        self.prompt_size.observe(prompt_tokens)
        self.asked_size.observe(gen_length)

    def finished(self, reason: str, tokens: int, steps: int, edits: int) -> None:
        """A request ended well."""
        self._success.labels(self._model, reason).inc()
        self._answer_tokens.inc(tokens)
        self._edits.inc(edits)
        self.answer_size.observe(tokens)
        self.steps.observe(steps)

    def failed(self, reason: str) -> None:
        """A request ended with an error; ``reason`` is its code."""
        self._failure.labels(self._model, reason).inc()

    def aborted(self, reason: str) -> None:
        """A request was dropped: "disconnect", "deadline", "deleted" or "shutdown"."""
        self._aborted.labels(self._model, reason).inc()

    def rejected(self, reason: str) -> None:
        """A request was refused for lack of room."""
        self._rejected.labels(self._model, reason).inc()

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP request was answered; ``route`` is the template, never the raw path."""
        self._http.labels(method, route, str(status)).inc()
        self._http_time.labels(method, route).observe(seconds)

    def render(self, gauges: Gauges) -> bytes:
        """The page that Prometheus reads."""
        current = CollectorRegistry()
        current.register(_Current(gauges, self._model, self._compat))
        return generate_latest(self.registry) + generate_latest(current)


class _Current(Collector):
    """Gauges, and counters that others keep."""

    def __init__(self, gauges: Gauges, model: str, compat: str) -> None:
        self._now, self._model, self._compat = gauges, model, compat

    def collect(self) -> Iterator[Metric]:
        """Every family, once."""
        now, engine = self._now, self._now.engine
        routing = {
            "num_requests_running": ("Requests that take part in forward passes.", now.running),
            "num_requests_waiting": ("Requests that wait for their first.", now.waiting),
            "kv_cache_usage_perc": ("Share of the K,V pages in use, 0 to 1.", engine.pages_used),
        }
        for name, (text, value) in routing.items():
            yield self._family(GaugeMetricFamily, PREFIX + name, text, value)
            if self._compat == "vllm":
                yield self._family(GaugeMetricFamily, f"vllm:{name}", text, value)
        for name, text, value in (
            ("outstanding_work", "Tokens that requests under way may compute.", now.work),
            ("results_stored", "Results that are kept.", now.results),
            ("results_bytes", "Bytes of the results that are kept.", now.result_bytes),
            ("ready", "1 while requests are taken.", float(now.ready)),
            ("http_connections", "Open HTTP connections.", now.connections.open),
        ):
            yield self._family(GaugeMetricFamily, PREFIX + name, text, value)
        for name, text, value in (
            ("num_preemptions", "Times that a request gave its K,V pages up.", engine.preempted),
            ("prefix_cache_queries", "Tokens of prompts that could be cached.", engine.prompts),
            ("prefix_cache_hits", "Those of them whose K,V were found.", engine.cached),
            ("engine_restarts", "Engines started after the first.", now.restarts),
            ("engine_steps", "Forward passes.", engine.steps),
            ("engine_busy_seconds", "Seconds with a request under way.", engine.busy),
            (
                "diffusion_num_denoising_steps",
                "Requests in forward passes that decided tokens.",
                engine.spans,
            ),
            (
                "diffusion_num_canvas_positions",
                "Positions of active blocks in forward passes.",
                engine.positions,
            ),
            (
                "diffusion_num_committed_tokens",
                "Positions that joined a committed prefix.",
                engine.committed,
            ),
        ):
            yield self._family(CounterMetricFamily, PREFIX + name, text, value)
        name, text = PREFIX + "results_evicted", "Results dropped."
        yield self._family(CounterMetricFamily, name, text, now.evicted, "reason")
        yield from self._connections()
        yield from self._each_engine()

    def _connections(self) -> Iterator[Metric]:
        """What happened below the application."""
        refused = CounterMetricFamily(
            PREFIX + "http_refused", "Refused before the application.", labels=["status"]
        )
        for status, count in sorted(self._now.connections.refused.items()):
            refused.add_metric([str(status)], count)
        yield refused
        dropped = CounterMetricFamily(
            PREFIX + "http_connections_dropped", "Closed without an answer.", labels=["reason"]
        )
        for reason in DROPS:
            dropped.add_metric([reason], self._now.connections.dropped[reason])
        yield dropped

    def _each_engine(self) -> Iterator[Metric]:
        """Families with a series for every engine."""
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        running = "Requests that take part in an engine's forward passes."
        work = "Tokens that the requests of an engine may compute."
        engines = {str(index): engine for index, engine in enumerate(self._now.engines)}
        for kind, name, text, attribute in (
            (gauge, "engine_up", "1 while the engine is ready.", "up"),
            (gauge, "engine_requests_running", running, "running"),
            (gauge, "engine_outstanding_work", work, "work"),
            (counter, "engine_replaced", "Engines started in an engine's place.", "restarts"),
        ):
            values = {index: float(getattr(e, attribute)) for index, e in engines.items()}
            yield self._family(kind, PREFIX + name, text, values, "engine")

    def _family(
        self,
        kind: type[GaugeMetricFamily | CounterMetricFamily],
        name: str,
        text: str,
        values: float | Mapping[str, float],
        label: str = "",
    ) -> Metric:
        """A family with one value, or with one for each value of a label besides the model's."""
        family = kind(name, text, labels=["model_name", label] if label else ["model_name"])
        if isinstance(values, Mapping):
            for key, value in values.items():
                family.add_metric([self._model, key], value)
        else:
            family.add_metric([self._model], values)
        return family
