"""One line on stderr and a named exit code, whatever goes wrong."""

from __future__ import annotations

import re

import click
import pytest
import redis
from click.testing import CliRunner

from rq_models import errors
from rq_models.cli import main
from rq_models.cli.app import to_json
from rq_models.cli.outcome import EXIT_CODES, FAILURE, explain, printable
from rq_models.server import ServerUnavailable


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigurationError(), 3),
        (errors.InvalidInput(), 4),
        (errors.InvalidJob(), 4),
        (errors.InvalidRun(), 4),
        (errors.RunConflict(), 4),
        (errors.UnknownModel(), 5),
        (errors.NoWorker(), 5),
        (errors.ModelError(), 6),
        (errors.ModelBroken(), 6),
        (errors.ModelTimeout(), 6),
        (errors.ModelCrashed(), 6),
        (errors.InvalidOutput(), 6),
        (TimeoutError("no result in 3 s"), 7),
        (redis.ConnectionError("refused"), 8),
        (redis.TimeoutError("late"), 8),
        (redis.AuthenticationError("WRONGPASS"), 8),
        (redis.ResponseError("unknown command"), 8),
        (ServerUnavailable("taken"), 8),
        (errors.JobNotFound(), 9),
        (errors.UnknownRun(), 9),
        (errors.JobLost(), 10),
        (errors.RunFailed(), 10),
        (errors.JobCancelled(), 10),
        (errors.QueueFull(), 10),
        (click.UsageError("no"), 2),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (ZeroDivisionError(), 1),
        (RecursionError(), 1),
        (PermissionError(13, "Permission denied", "churn"), 1),
    ],
)
def test_each_kind_of_error_has_its_code(error: BaseException, code: int) -> None:
    found, message = explain(error, "redis://here")

    assert found == code
    assert "\n" not in message


def test_every_error_of_ours_has_a_code() -> None:
    def tree(cls: type[errors.RqModelsError]) -> set[type[errors.RqModelsError]]:
        return {cls}.union(*(tree(child) for child in cls.__subclasses__()))

    assert all(explain(cls(), None)[0] != FAILURE for cls in tree(errors.RqModelsError))


def test_the_models_own_type_is_named_once() -> None:
    assert explain(errors.ModelError("no roots", type="ArithmeticError"), None)[1] == (
        "the model raised ArithmeticError: no roots"
    )
    assert explain(errors.ModelError("KeyError: 'x'", type="KeyError", job_id="j"), None)[1] == (
        "the model raised KeyError: 'x'; see rq-models job j"
    )


def test_help_names_every_code() -> None:
    text = CliRunner().invoke(main, ["--help"]).stdout

    assert {int(number) for number in re.findall(r"^ +(\d+)  ", text, re.MULTILINE)} == EXIT_CODES.keys()


def test_every_command_has_help_that_fits() -> None:
    listed = CliRunner().invoke(main, ["--help"]).stdout

    assert "..." not in listed.partition("Commands:")[2]
    for name in main.commands:
        assert f"  {name} " in listed
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def callback(**_: object) -> None:
        raise error

    monkeypatch.setattr(main.commands["models"], "callback", callback)


def test_an_unexpected_error_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError("secret"))

    result = CliRunner().invoke(main, ["models"])

    assert result.exit_code == 1
    assert result.stderr == (
        "rq-models: unexpected ZeroDivisionError; for the traceback, run it again with RQ_MODELS_DEBUG=1\n"
    )


def test_but_has_one_for_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError())
    monkeypatch.setenv("RQ_MODELS_DEBUG", "1")

    assert isinstance(CliRunner().invoke(main, ["models"]).exception, ZeroDivisionError)


def test_ctrl_c_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())

    result = CliRunner().invoke(main, ["models"])

    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.mark.parametrize("arguments", [["nosuch"], ["job"], ["worker", "-n", "0"], ["--nosuch"], ["predict", "m"]])
def test_a_wrong_command_line_is_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)

    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "--help" in result.stderr


def test_debugging_shows_no_traceback_of_a_wrong_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_MODELS_DEBUG", "1")

    assert CliRunner().invoke(main, ["nosuch"]).exit_code == 2


def test_the_system_speaks_for_itself() -> None:
    assert explain(PermissionError(13, "Permission denied", "x"), None)[1] == "[Errno 13] Permission denied: 'x'"


def test_no_password_is_shown() -> None:
    for url in ("redis://:secret@127.0.0.1:1/0", "redis://127.0.0.1:1/0?password=secret"):
        result = CliRunner().invoke(main, ["--url", url, "models"])

        assert result.exit_code == 8
        assert "secret" not in result.output
        assert "***" in result.stderr


def test_a_wrong_address_names_where_it_came_from() -> None:
    assert "--url is no Redis address" in CliRunner().invoke(main, ["--url", "http://x", "models"]).stderr
    assert "REDIS_URL is no" in CliRunner().invoke(main, ["models"], env={"REDIS_URL": "http://x"}).stderr


def test_no_configuration_at_all(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(main, ["models"])

    assert result.exit_code == 3
    assert "rq-models init NAME" in result.stderr


def test_the_version() -> None:
    assert re.fullmatch(r"rq-models \d+\.\d+\.\d+\n", CliRunner().invoke(main, ["--version"]).stdout)


def test_text_that_could_steer_a_terminal_is_made_harmless() -> None:
    assert printable("a\x1b[2J\nb\x9b\tc") == "a\ufffd[2J\nb\ufffd\tc"
    assert to_json({"name": "é"}) == '{"name": "é"}'
    assert to_json("\x9b\ud800") == r'"\u009b\ud800"'
