"""For RQ's own command: ``rq worker -c rq_models.rq_settings -w rq_models.ModelWorker MODEL``.

RQ reads upper-case names from this module when it is imported.
"""

from rq_models.errors import ConfigurationError
from rq_models.settings import Settings

try:
    _settings = Settings.load()
except ConfigurationError as error:
    # RQ's command would print the traceback of anything else.
    raise SystemExit(error.message) from None

REDIS_URL = _settings.redis_url
QUEUES = sorted(_settings.models)
