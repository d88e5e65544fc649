"""``rq-models init``: a project folder that runs as it is."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

import click

from rq_models import jobs

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# Where each template goes; $module is the model's module.
_LAYOUT = {
    "README.md.txt": "README.md",
    "base.toml.txt": "config/base.toml",
    "conftest.py.txt": "conftest.py",
    "gitignore.txt": ".gitignore",
    "model.py.txt": "models/$module.py",
    "models_init.py.txt": "models/__init__.py",
    "requirements.txt": "requirements-$name.txt",
    "test_model.py.txt": "tests/test_$module.py",
}


@click.command()
@click.argument("name")
def init(name: str) -> None:
    """Make a new project in a folder NAME.

    It has a model of that name, its test and its configuration, and runs as it is.
    """
    if not _NAME.fullmatch(name) or keyword.iskeyword(name.lower()) or name in vars(jobs):
        raise click.UsageError(
            f"'{name}' can't be a model's name: begin with a letter, use letters, digits, '_' and '-', "
            "and no word of Python's or name in rq_models.jobs"
        )
    root = Path(name)
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise click.UsageError(f"{root} exists already and is not an empty folder; choose another name")
    module = name.replace("-", "_").lower()
    cls = "".join(part.capitalize() for part in module.split("_"))
    serve = f"{name}={cls}" if name.isidentifier() else f'**{{"{name}": {cls}}}'
    words = {"name": name, "module": module, "cls": cls, "serve": serve}
    skeleton = files("rq_models").joinpath("skeleton")
    for source, target in _LAYOUT.items():
        path = root / Template(target).substitute(words)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(skeleton.joinpath(source).read_text("utf-8")).substitute(words), "utf-8")
    click.echo(f"{root}/ is ready; the model is models/{module}.py. Next: cd {root} && rq-models up")
