"""How a command ends: the exit codes, and what is said of an error."""

from __future__ import annotations

from enum import IntEnum
from typing import Self

import click
from redis import exceptions as redis_errors

from rq_models.errors import (
    ConfigurationError,
    InvalidInput,
    InvalidJob,
    JobNotFound,
    ModelFault,
    NoWorker,
    RqModelsError,
    SystemFault,
    UnknownModel,
)
from rq_models.server import ServerUnavailable


class ExitCode(IntEnum):
    """What the exit status of ``rq-models`` says."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        """Make a member that also carries its sentence for ``--help``."""
        code = int.__new__(cls, value)
        code._value_ = value
        code.meaning = meaning
        return code

    OK = 0, "done"
    FAILURE = 1, "something unexpected, or a started process failed"
    USAGE = 2, "wrong command line"
    CONFIGURATION = 3, "wrong configuration, or a missing extra"
    BAD_INPUT = 4, "the input does not fit the model, or is not JSON"
    NO_MODEL = 5, "no such model, or nobody serves it"
    MODEL = 6, "the model failed: broken, raised, crashed, too slow, or no JSON returned"
    TIMEOUT = 7, "no result yet when the wait ended"
    REDIS = 8, "Redis does not answer, refuses, or something else holds its port"
    NOT_FOUND = 9, "no such job; it may have expired"
    SYSTEM = 10, "the job was lost, cancelled or not accepted"
    INTERRUPTED = 130, "interrupted by Ctrl-C"


# The first class that fits counts.
_OURS: list[tuple[type[RqModelsError], ExitCode]] = [
    (ConfigurationError, ExitCode.CONFIGURATION),
    (InvalidInput, ExitCode.BAD_INPUT),
    (InvalidJob, ExitCode.BAD_INPUT),
    (UnknownModel, ExitCode.NO_MODEL),
    (NoWorker, ExitCode.NO_MODEL),
    (ModelFault, ExitCode.MODEL),
    (ServerUnavailable, ExitCode.REDIS),
    (JobNotFound, ExitCode.NOT_FOUND),
    (SystemFault, ExitCode.SYSTEM),
    (RqModelsError, ExitCode.SYSTEM),
]


def explain(error: BaseException, where: str | None) -> tuple[ExitCode, str]:  # noqa: PLR0911 - one for each family
    """Return the exit code of an error and one line for a person.

    Args:
        error: whatever a command raised.
        where: the masked address of Redis, for errors about it.
    """
    if isinstance(error, RqModelsError):
        code = next(code for cls, code in _OURS if isinstance(error, cls))
        kind = f" ({error.type})" if error.type and error.type not in error.message else ""
        return code, one_line(error.message) + kind
    if isinstance(error, click.ClickException):
        text = one_line(error.format_message())
        if not isinstance(error, click.UsageError):
            return ExitCode.FAILURE, text
        return ExitCode.USAGE, f"{text} (see '{error.ctx.command_path if error.ctx else 'rq-models'} --help')"
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return ExitCode.INTERRUPTED, ""
    if isinstance(error, redis_errors.RedisError):
        return ExitCode.REDIS, _redis_sentence(error, where or "the configured address")
    if isinstance(error, TimeoutError):
        return ExitCode.TIMEOUT, one_line(str(error)) or "no result in time"
    if isinstance(error, OSError):
        return ExitCode.FAILURE, one_line(str(error))
    name = type(error).__name__
    return ExitCode.FAILURE, f"unexpected {name}; for the traceback, run it again with RQ_MODELS_DEBUG=1"


def _redis_sentence(error: redis_errors.RedisError, where: str) -> str:
    text = one_line(str(error))
    if isinstance(error, redis_errors.AuthenticationError | redis_errors.NoPermissionError) or "NOAUTH" in text:
        return f"Redis at {where} refuses the user name or password ({text}); correct redis_url or REDIS_URL"
    if isinstance(error, redis_errors.BusyLoadingError):
        return f"Redis at {where} is still reading its data; try again in a moment"
    if isinstance(error, redis_errors.ConnectionError | redis_errors.TimeoutError):
        return f"no Redis answers at {where} ({text}); run 'rq-models redis', or correct redis_url or REDIS_URL"
    return f"Redis at {where} answered: {text}"


def one_line(text: str) -> str:
    """Return the text without line breaks and without characters that could steer a terminal."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Return the text without characters that could steer a terminal; line breaks and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
