"""The dashboard: rq-dashboard for JSON jobs, with its holes closed, a page of the models, and ``/metrics``."""

from __future__ import annotations

from rq_models.errors import ConfigurationError

try:
    from rq_models.dashboard.app import create_app
    from rq_models.dashboard.server import serve
except ModuleNotFoundError as error:
    raise ConfigurationError(
        f"the dashboard is not installed (no module {error.name}); run: pip install 'rq-models[dashboard]'"
    ) from None

__all__ = ["create_app", "serve"]
