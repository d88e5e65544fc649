"""The models' counters in the text format of Prometheus."""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate
from typing import TYPE_CHECKING

from rq_models.registry import BUCKETS, count_queued, read_counters, read_models

if TYPE_CHECKING:
    from redis import Redis

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def render(connection: Redis) -> str:
    """Return the page. Its histograms have no sums: none are counted."""
    lines: defaultdict[str, list[str]] = defaultdict(list)  # all of a metric stand together

    def add(metric: str, value: int, part: str = "", **labels: str) -> None:
        inside = ",".join(f'{name}="{text.translate(_ESCAPES)}"' for name, text in labels.items())
        lines[metric].append(f"rq_models_{metric}{part}{{{inside}}} {value}")

    for status in read_models(connection):
        model, counters = status.name, read_counters(connection, status.name)
        add("predictions_total", counters.predictions, model=model)
        for kind, count in sorted(counters.failures.items()):
            add("failures_total", count, model=model, kind=kind)
        add("batches_total", counters.batches, model=model)
        add("loads_total", counters.loads, model=model)
        for metric, counts in (("queue_wait_seconds", counters.wait), ("model_seconds", counters.model)):
            for bound, count in zip(_BOUNDS, accumulate(counts), strict=True):
                add(metric, count, "_bucket", model=model, le=bound)
            add(metric, sum(counts), "_count", model=model)
        (queued,) = count_queued(connection, model)
        add("queued", queued, model=model)
        for state in ("cold", "warm", "broken"):
            add("workers", sum(one.state == state for one in status.serving), model=model, state=state)
    return "".join(f"{line}\n" for metric, found in lines.items() for line in (_type(metric), *found))


def _type(metric: str) -> str:
    kind = {"total": "counter", "seconds": "histogram"}.get(metric.rpartition("_")[2], "gauge")
    return f"# TYPE rq_models_{metric} {kind}"
