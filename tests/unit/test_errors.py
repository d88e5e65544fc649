from __future__ import annotations

import pytest

from rq_models import errors
from rq_models.errors import InvalidInput, ModelCrashed, ModelError, ModelTimeout, from_record


def test_a_record_comes_back_as_the_same_error() -> None:
    error = InvalidInput("petal_width: not a number", type="ValidationError")
    again = from_record(error.record(), job_id="one", traceback="text")
    assert type(again) is InvalidInput
    assert (again.message, again.type, again.retryable) == (error.message, "ValidationError", False)
    assert (again.job_id, again.traceback) == ("one", "text")


def test_a_record_has_exactly_four_fields() -> None:
    assert set(ModelCrashed("gone", retryable=True).record()) == {"kind", "type", "message", "retryable"}


@pytest.mark.parametrize(
    "record",
    [None, 3, "text", [], {}, {"message": 3}, {"kind": "os.system", "message": "m"}, {"kind": ["x"], "message": "m"}],
)
def test_whatever_stands_in_redis_becomes_a_model_error(record: object) -> None:
    assert type(from_record(record)) is ModelError


def test_the_message_of_a_failure_without_a_record_is_the_tracebacks_last_line() -> None:
    assert str(from_record(None, traceback="Traceback ...\nValueError: no\n")) == "ValueError: no"


def test_an_error_without_a_message_says_what_it_is() -> None:
    assert str(ModelTimeout()) == "The prediction took longer than its job_timeout."


def test_a_prediction_that_took_too_long_is_not_a_wait_that_expired() -> None:
    assert not issubclass(ModelTimeout, TimeoutError)


def test_the_tree_at_the_top_of_the_file_is_the_tree() -> None:
    drawn = {word for line in (errors.__doc__ or "").splitlines() for word in line.split() if word[:1].isupper()}
    assert {name for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, Exception)} <= drawn
