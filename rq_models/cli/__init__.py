"""The ``rq-models`` command: each command parses, builds what it needs from the settings, and calls.

A person sees one line for whatever goes wrong, and a script sees an exit code that says whose fault it was.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from rq_models.cli.app import App
from rq_models.cli.doctor import check
from rq_models.cli.init import init
from rq_models.cli.jobs import failed, job, replay
from rq_models.cli.models import models, predict
from rq_models.cli.orders import drain, reload_model
from rq_models.cli.outcome import EXIT_CODES, explain
from rq_models.cli.run import dashboard, redis, up, worker
from rq_models.cli.score import runs, score

if TYPE_CHECKING:
    from collections.abc import Sequence

_CODES = "\n".join(f"  {code:>3}  {meaning}" for code, (meaning, _) in EXIT_CODES.items())


class _Commands(click.Group):
    """A group that turns every error into one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any) -> NoReturn:  # type: ignore[override]
        """Run the command line and exit."""
        app = App()
        try:
            status = super().main(args, prog_name or "rq-models", **{**extra, "standalone_mode": False, "obj": app})
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            status = error.exit_code
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("RQ_MODELS_DEBUG") and not isinstance(error, click.ClickException):
                raise
            status, message = explain(error, app.masked_url)
            if message:
                click.echo(f"rq-models: {message}", err=True)
        sys.exit(status or 0)


@click.group(
    "rq-models",
    cls=_Commands,
    epilog=f"\b\nExit codes:\n{_CODES}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option("--url", metavar="URL", help="Redis address; else REDIS_URL, else redis_url in the configuration.")
@click.option("--config", metavar="FOLDER", help="Configuration folder; else RQ_MODELS_CONFIG, else ./config.")
@click.version_option(package_name="rq-models", message="%(package)s %(version)s")
@click.pass_obj
def main(app: App, url: str | None, config: str | None) -> None:
    """Serve machine-learning models behind Redis queues.

    A new project: rq-models init churn && cd churn && rq-models up
    """
    app.url, app.config = url, config


_PROCESSES = (up, worker, redis, dashboard)
for _command in (*_PROCESSES, init, predict, score, runs, models, reload_model, drain, job, failed, replay, check):
    main.add_command(_command)
