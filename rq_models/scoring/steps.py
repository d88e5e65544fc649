"""The steps of a run, as a worker does them: plan, chunk, merge. What they need is imported with the first of them."""

from __future__ import annotations

import json
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rq_models.errors import InvalidRun
from rq_models.registry import read_model
from rq_models.scoring import columns, files, formats, parts, runs
from rq_models.scoring import plan as planning
from rq_models.scoring.plan import Misfit, Plan
from rq_models.scoring.work import OtherVersion
from rq_models.stable import GaveUp

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from rq_models.ledger import Taken
    from rq_models.scoring.runs import Record
    from rq_models.scoring.work import Scorer

_SLICE_SECONDS = 0.01
"""Model time of a slice: as long single predictions wait at most, before it is their turn."""
_CHUNK_SECONDS = 1.0
"""Model time of a chunk: as much is done again at most, when a worker dies."""
_MOST_ROWS = 8192
"""Of a slice."""
_MOST_CHUNK_ROWS = 500_000
_MOST_BYTES = 1 << 22
"""Of a slice: some of them are in memory at a time."""
_SAMPLE_ROWS = 2 * _MOST_ROWS
_LEASES = 6
"""Leases for which a run waits for a worker that has its version of the model, while there are others only."""
_AHEAD = 3
"""Slices that are read before the model is ready for them, and that may wait to be written."""

# -- plan -------------------------------------------------------------------------------------------------------


def plan(scorer: Scorer, record: Record, taken: Taken) -> None:
    """Look at the input, the output and the model; write down the plan, and enqueue the chunks that are left."""
    asked = record.asked
    if record.plan is None:
        if not _plan_anew(scorer, record, taken):
            return
    else:
        plan = Plan.of(record.plan)
        with scorer.attended():
            _require_same(f"the input {asked.input}", plan.fingerprint, scorer.aside(files.fingerprint, asked.input))
            _require_version(scorer, record, plan.version, leases=0)
        _require_few_failed(record)
        if not scorer.tell(partial(runs.keep_plan, scorer.connection, taken, record)):
            return
    planned = scorer.tell(partial(runs.read, scorer.connection, record.id))
    if planned.attempt == record.attempt and planned.progress.state == "running":
        steps = scorer.tell(partial(runs.left, scorer.connection, planned)) or [runs.MERGE]
        scorer.tell(partial(runs.enqueue, scorer.connection, asked.model, record.id, record.attempt, steps))


def _plan_anew(scorer: Scorer, record: Record, taken: Taken) -> bool:
    """Make a plan and let the run go by it; return whether it does."""
    output = record.asked.output
    # Of this execution alone: one that was taken for dead may be planning, too.
    name = parts.folder_name(record.id, record.attempt, taken.run)
    kept = False
    try:
        with scorer.attended():
            fingerprint = scorer.aside(files.fingerprint, record.asked.input)
            version = scorer.version()
            _check_output(scorer, record)
            plan = _made(scorer, record, name, fingerprint, version)
            if scorer.version() != version:
                # Reloaded meanwhile.
                raise GaveUp
        kept = scorer.tell(partial(runs.keep_plan, scorer.connection, taken, record, plan.stored()))
    finally:
        if not kept:
            with suppress(Exception):  # how it ends does not depend on it
                # The first try may have been heard, and others go by this plan since.
                found = runs.read(scorer.connection, record.id)
                if (found.plan or {}).get("folder") != name:
                    scorer.submit(files.remove, parts.parts_folder(output, name)).result()
                    scorer.submit(files.remove_folder, parts.parts_folder(output)).result()
    if kept:
        scorer.aside(parts.clear_up, output, record.id, record.attempt, name)
    return kept


def _require_few_failed(record: Record) -> None:
    """Raise InvalidRun if more rows have failed than may."""
    most, failed = record.asked.max_errors, record.progress.failed
    if most is not None and failed > most:
        raise InvalidRun(f"{failed} rows failed, more than max_errors ({most})")


def _check_output(scorer: Scorer, record: Record) -> None:
    output, overwrite = record.asked.output, record.asked.overwrite
    scorer.aside(files.check_output, output, runs.errors_address(output), overwrite=overwrite)


def _made(scorer: Scorer, record: Record, folder: str, fingerprint: str, version: str) -> Plan:
    asked, card = record.asked, scorer.card()
    schema, form = card.get("input_schema"), formats.format_of(asked.input)
    into = formats.format_of(asked.output)
    names = None if asked.header else planning.input_names(schema)
    if form.name == "csv" and not asked.header and names is None:
        raise Misfit("without a header the columns are the model's inputs in their order, but its schema names none")
    found = scorer.aside(formats.inspect, asked.input, header=asked.header, names=names)
    keep = found.columns if asked.keep is None else list(asked.keep)
    if missing := [name for name in keep if name not in found.columns]:
        raise Misfit(f"keep names {planning.listed(missing)}; the input has {planning.listed(found.columns)}")
    guess = {name: columns.kind_of(found.types[name]) for name in found.columns}
    wanted, whole = planning.inputs(schema, found.columns, guess, sampled=form.name == "jsonl")
    outputs = planning.outputs(card.get("output_schema"))

    source = _source(asked, folder)
    cut = partial(formats.split, header=asked.header, spool=source, beat=scorer.pulse)
    first = scorer.aside(cut, asked.input, _SAMPLE_ROWS)
    most = max(1, min(_MOST_ROWS, int(_MOST_BYTES / max(found.row_bytes, 1))))
    draft = Plan(
        fingerprint=fingerprint,
        version=version,
        names=found.columns,
        inputs=wanted,
        whole=whole,
        outputs=outputs or [],
        layout="",
        slice_rows=asked.slice_rows or min(scorer.model().max_batch_size, most),
        rows=0,
        row_bytes=found.row_bytes,
        folder=folder,
        pieces=first,
    )
    tried = _tried(scorer, record, draft, most)
    per_chunk = min(round(tried.rows * _CHUNK_SECONDS / max(tried.seconds, 1e-6)), _MOST_CHUNK_ROWS)
    per_chunk = max(per_chunk // tried.rows, 1) * tried.rows
    # What was packed is unpacked already.
    pieces = scorer.aside(cut, source, per_chunk)
    typed: dict[str, str] = {}
    if form.name == "csv" and into.name != "csv":
        typed = {one.name: one.kind for one in wanted}
    elif form.name == "jsonl":
        # Whole numbers so far.
        typed = {one.name: one.kind for one in wanted if one.kind == "f8" and found.types.get(one.name) == "int64"}
    layout = parts.layout(found, keep, [vars(one) for one in tried.outputs], typed)
    total = pieces[-1][1] if pieces and form.name == "parquet" else len(pieces) * per_chunk
    return replace(
        draft, outputs=tried.outputs, layout=layout.dumps(), slice_rows=tried.rows, rows=total, pieces=pieces
    )


def _tried(scorer: Scorer, record: Record, draft: Plan, most: int) -> _Tried:
    """Predict the first rows, to see how many make a slice, and what the model gives back if no schema says it.

    Slices grow from the configured batch and are as large as what was seen to work: a model whose memory is just
    enough for its batches fails on more, and its slices stay small.
    """
    fixed = record.asked.slice_rows is not None
    tried = _Tried(draft.slice_rows, _SLICE_SECONDS, draft.outputs or [planning.Wanted("", "json")])
    rows = tried.rows
    while draft.pieces:
        source = scorer.aside(_read, record, replace(draft, slice_rows=rows), draft.pieces[0])
        ready = scorer.aside(_next_question, source, draft, scorer.model().job_timeout)
        if ready is None:
            break
        part, question, blob = ready
        answer = scorer.ask(question, blob)
        if not draft.outputs and not tried.guessed:
            values = json.loads(bytes(answer["blob"]))
            tried = replace(tried, outputs=planning.guessed_outputs(values), guessed=any(v is not None for v in values))
        if len(answer["failed"]) > len(part.broken) and len(answer["failed"]) == part.rows:
            # Not for their number, if it was so from the beginning; and if not, the number before was right.
            break
        tried = replace(tried, rows=rows, seconds=answer["seconds"])
        more = planning.grown(rows, answer["seconds"], _SLICE_SECONDS, most)
        if fixed or part.rows < rows or more <= rows:
            if not fixed:
                tried = replace(tried, rows=more, seconds=answer["seconds"] * more / rows)
            break
        rows = more
    return tried


def chunk(scorer: Scorer, record: Record, taken: Taken, number: int) -> None:
    """Predict the rows of one piece, write their part, and commit it."""
    asked, plan = record.asked, Plan.of(record.plan or {})
    if scorer.tell(partial(runs.is_done, scorer.connection, record.id, number)):
        # By an execution that died before it could say so.
        _go_on(scorer, record, len(scorer.tell(partial(runs.left, scorer.connection, record))))
        return
    _require_version(scorer, record, plan.version, leases=_LEASES)
    name = f"part-{number:06d}-{taken.run}"
    address = f"{parts.parts_folder(asked.output, plan.folder)}/{name}"
    fingerprint = partial(scorer.aside, files.fingerprint, asked.input)
    with scorer.attended():
        _require_same(f"the input {asked.input}", plan.fingerprint, fingerprint())
        layout = parts.Layout.loads(plan.layout)
        writer = scorer.aside(parts.PartWriter, address, formats.format_of(asked.output), layout)
        try:
            _predict(scorer, record, plan, plan.pieces[number], writer)
            _require_same(f"the input {asked.input}", plan.fingerprint, fingerprint())
            scorer.aside(writer.close)
        except BaseException:
            scorer.settle()
            writer.discard()
            raise
    part = {"part": name, "rows": writer.rows, "failed": writer.failed, "size": writer.size}
    left = scorer.tell(partial(runs.commit, scorer.connection, taken, record, number, part))
    if left is None:
        # It may be entered all the same: by a first try that nobody answered, or as the last before the run's end.
        if scorer.tell(partial(runs.parts, scorer.connection, record.id)).get(number) != part:
            scorer.aside(parts.remove_part, address)
        progress = scorer.tell(partial(runs.read, scorer.connection, record.id)).progress
        if progress.is_over:
            scorer.tell(partial(runs.clear, scorer.connection, record, taken.id))
        if progress.state == "finished":
            # By others, and this one was too late; it has made the folder anew.
            scorer.aside(clear_up, record)
        return
    _go_on(scorer, record, left)


def _go_on(scorer: Scorer, record: Record, left: int) -> None:
    if left == 0:
        merge = partial(runs.enqueue, scorer.connection, record.asked.model, record.id, record.attempt, [runs.MERGE])
        scorer.tell(merge)


def _predict(scorer: Scorer, record: Record, plan: Plan, piece: tuple[int, int], writer: parts.PartWriter) -> None:
    """Predict a piece slice by slice: some are read ahead of the model, and some written behind it."""
    most = record.asked.max_errors
    source = _read(record, plan, piece)
    question_of = partial(_next_question, source, plan, scorer.model().job_timeout)
    ahead = deque(scorer.submit(question_of) for _ in range(_AHEAD))
    behind: deque[Future[None]] = deque()
    while (ready := scorer.result(ahead.popleft())) is not None:
        ahead.append(scorer.submit(question_of))
        part, question, blob = ready
        answer = scorer.ask(question, blob)
        if scorer.version() != plan.version:
            raise OtherVersion
        behind.append(scorer.submit(writer.write, part, answer["columns"], answer["blob"], answer["failed"]))
        if len(behind) > _AHEAD:
            scorer.result(behind.popleft())
        if most is not None and writer.failed > most:
            raise InvalidRun(f"more than {most} rows failed (max_errors)")
        scorer.between()
    for work in behind:
        scorer.result(work)


def _read(record: Record, plan: Plan, piece: tuple[int, int]) -> Iterator[formats.Slice]:
    asked = record.asked
    kept = parts.Layout.loads(plan.layout).kept.names if plan.layout else []
    wanted = list(dict.fromkeys([*(one.name for one in plan.inputs), *kept]))
    form = formats.format_of(asked.input)
    source = _source(asked, plan.folder)
    return formats.read(source, form, piece, names=plan.names, wanted=wanted, slice_rows=plan.slice_rows)


def merge(scorer: Scorer, record: Record, taken: Taken) -> None:
    """Make the output of all parts; it appears whole."""
    asked, plan = record.asked, Plan.of(record.plan or {})
    folder, layout = parts.parts_folder(asked.output, plan.folder), parts.Layout.loads(plan.layout)
    _require_few_failed(record)
    with scorer.attended():
        if not record.merged:
            _check_output(scorer, record)
        if not scorer.tell(partial(runs.end, scorer.connection, record, "merging", by=taken)):
            return
        done = scorer.tell(partial(runs.parts, scorer.connection, record.id))
        found = [done[number] for number in range(len(plan.pieces))]
        order = [parts.Part(f"{folder}/{one['part']}", one["rows"], one["failed"], one["size"]) for one in found]
        rows = sum(part.rows for part in order)
        # Parquet is the only format that says how many it has.
        if formats.format_of(asked.input).name == "parquet" and rows != plan.rows:
            raise InvalidRun(f"{plan.rows} rows are there and {rows} were read; --restart (restart=True) starts over")
        merge_of = partial(parts.merge, row_bytes=plan.row_bytes, beat=scorer.pulse)
        scorer.aside(merge_of, order, asked.output, layout, folder)
        scorer.tell(partial(runs.end, scorer.connection, record, "finished", by=taken))
        # It may have been cancelled in the last moment, and then goes on from its parts.
        if scorer.tell(partial(runs.read, scorer.connection, record.id)).progress.state == "finished":
            scorer.aside(clear_up, record)


def clear_up(record: Record) -> None:
    """Remove the parts of a run, which are in its output."""
    parts.clear_up(record.asked.output, record.id, record.attempt)


@dataclass(frozen=True)
class _Tried:
    """What trying has shown: rows and seconds of a slice, and what the model gives back."""

    rows: int
    seconds: float
    outputs: list[planning.Wanted]
    guessed: bool = False


def _next_question(
    source: Iterator[formats.Slice], plan: Plan, timeout: int
) -> tuple[formats.Slice, dict[str, Any], bytes] | None:
    """Return the next slice and what the horse is asked of it; None after the last."""
    part = next(source, None)
    if part is None:
        return None
    pairs = [columns.wire_column(part, one.name, one.kind, omit=one.omit) for one in plan.inputs]
    question = {
        "rows": part.rows,
        "columns": [column for column, _ in pairs],
        "whole": plan.whole,
        "outputs": [{"name": one.name, "kind": one.kind} for one in plan.outputs] or None,
        "timeout": timeout,
    }
    return part, question, b"".join(data for _, data in pairs)


def _require_same(what: str, before: str, now_: str) -> None:
    if before != now_:
        changed = f"{runs.shown(what)} has changed since the run began"
        raise InvalidRun(f"{changed}; --restart (restart=True) starts over")


def _require_version(scorer: Scorer, record: Record, version: str, *, leases: float) -> None:
    """Raise OtherVersion if the model has not this version here.

    Raises:
        InvalidRun: for so many leases no worker has had it, nor could have.
    """
    if scorer.version() == version:
        scorer.missed_since.clear()
        return
    model, attempt = record.asked.model, (record.id, record.attempt)
    status = scorer.tell(partial(read_model, scorer.connection, model))
    serving = status.serving if status else []
    if any(one.state != "warm" or (one.version or "") == version for one in serving):
        scorer.missed_since.pop(attempt, None)
    elif time.monotonic() - scorer.missed_since.setdefault(attempt, time.monotonic()) >= leases * scorer.model().lease:
        _require_same(f"the version of model {model}", version, scorer.version())
    raise OtherVersion


def _source(asked: runs.Asked, folder: str) -> str:
    """Return where the rows are read: what is packed is unpacked beside the parts."""
    form = formats.format_of(asked.input)
    return f"{parts.parts_folder(asked.output, folder)}/input.{form.name}" if form.gzip else asked.input
