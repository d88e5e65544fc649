"""Scoring of files: a file of rows in, the same rows with predictions out, a chunk at a time by any of the workers."""

from __future__ import annotations


def step(run: str, attempt: int, name: str | int) -> None:
    """Stand for a step of a run in its job's record; a worker of rq-models runs it by itself, see `work.Scorer`."""
    raise RuntimeError(f"step {name} of run {run}, attempt {attempt}, is for a worker of rq-models")
