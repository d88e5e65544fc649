"""``python -m rq_models`` is ``rq-models``."""

from rq_models.cli import main

if __name__ == "__main__":
    main(prog_name="rq-models")
