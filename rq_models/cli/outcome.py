"""How a command ends: the exit codes, and what is said of an error."""

from __future__ import annotations

import click
from redis.exceptions import RedisError

from rq_models import errors, health
from rq_models.server import ServerUnavailable

FAILURE = 1
# The first one that an error fits counts; what fits none is a FAILURE.
EXIT_CODES: dict[int, tuple[str, tuple[type[BaseException], ...]]] = {
    0: ("done", ()),
    FAILURE: ("something unexpected, or a started process failed", ()),
    2: ("wrong command line", (click.UsageError,)),
    3: ("wrong configuration, or a missing extra", (errors.ConfigurationError,)),
    4: (
        "the input does not fit the model or is not JSON; what score is asked does not go with what was begun",
        (errors.InvalidInput, errors.InvalidJob, errors.InvalidRun),
    ),
    5: ("no such model, or nobody serves it", (errors.UnknownModel, errors.NoWorker)),
    6: ("the model failed: broken, raised, crashed, too slow, or no JSON returned", (errors.ModelFault,)),
    7: ("no result yet when the wait ended", (TimeoutError,)),
    8: ("Redis does not answer, refuses, or something else holds its port", (RedisError, ServerUnavailable)),
    9: ("no such job or run; it may have expired", (errors.JobNotFound, errors.UnknownRun)),
    10: (
        "the job was lost, cancelled or not accepted; the run failed, by its file say, or was cancelled",
        (errors.RqModelsError,),
    ),
    130: ("interrupted by Ctrl-C", (KeyboardInterrupt, click.Abort)),
}


def explain(error: BaseException, where: str | None) -> tuple[int, str]:
    """Return the exit code of an error and one line for a person, which is empty after Ctrl-C.

    Args:
        error: whatever a command raised.
        where: the masked address of Redis, for errors about it.
    """
    code = next((code for code, (_, kinds) in EXIT_CODES.items() if isinstance(error, kinds)), FAILURE)
    text = str(error)
    if isinstance(error, errors.RqModelsError) and error.type and error.type not in text:
        text = f"{text} ({error.type})" if isinstance(error, errors.InvalidInput) else f"{error.type}: {text}"
    elif isinstance(error, RedisError):
        text = health.explain(error, where or "the configured address")
    elif isinstance(error, click.UsageError):
        text = f"{error.format_message()} (see '{error.ctx.command_path if error.ctx else 'rq-models'} --help')"
    elif isinstance(error, KeyboardInterrupt | click.Abort):
        text = ""
    elif not isinstance(error, errors.RqModelsError | click.ClickException | OSError):
        text = f"unexpected {type(error).__name__}; for the traceback, run it again with RQ_MODELS_DEBUG=1"
    if isinstance(error, errors.ModelError) and error.type:
        text = f"the model raised {text}" + (f"; see rq-models job {error.job_id}" if error.job_id else "")
    return code, one_line(text)


def one_line(text: str) -> str:
    """Return the text without line breaks and without characters that could steer a terminal."""
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Return the text without characters that could steer a terminal; line breaks and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
