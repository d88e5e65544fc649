"""Every mistake in the configuration is one line that names the file, the key and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from rq_models.errors import ConfigurationError
from rq_models.settings import Settings, mask_url

BASE = """
redis_url = "redis://:hunter2@127.0.0.1:6379/3"

[models.iris_model]
class = "iris_model.iris_predict:IrisModel"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = tmp_path / "config"
    config.mkdir()
    (config / "base.toml").write_text(BASE)
    return config


def load(folder: Path, **environ: str) -> Settings:
    return Settings.load(folder, environ=environ)


def complaint(folder: Path, **environ: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load(folder, **environ)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_are_the_designs(folder: Path) -> None:
    model = load(folder).model("iris_model")
    assert (model.max_batch_size, model.max_wait_ms, model.workers) == (64, 0, 1)
    assert (model.job_timeout, model.load_timeout, model.preload, model.swap) == (60, 300, False, "restart")
    assert (model.retries, model.retry_on, model.result_ttl, model.failure_ttl) == (3, (), 3600, 604800)
    assert (model.allowed_callbacks, model.env) == ((), {})
    assert (model.max_queued, model.max_input_bytes, model.max_output_bytes) == (None, 16 << 20, 16 << 20)


def test_settings_are_frozen(folder: Path) -> None:
    with pytest.raises(Exception, match="frozen"):
        load(folder).redis_url = "redis://elsewhere"  # type: ignore[misc]


def test_the_overlay_merges_tables_by_key(folder: Path) -> None:
    (folder / "prod.toml").write_text("[models.iris_model]\nworkers = 4\n[models.churn]\nclass = 'churn:Churn'\n")
    settings = load(folder, RQ_MODELS_ENV="prod")
    assert settings.model("iris_model").workers == 4
    assert settings.model("iris_model").class_path == "iris_model.iris_predict:IrisModel"
    assert settings.model("churn").class_path == "churn:Churn"
    assert settings.files == (folder / "base.toml", folder / "prod.toml")


def test_the_option_wins_over_the_environment_over_the_overlay_over_base(folder: Path) -> None:
    (folder / "prod.toml").write_text('redis_url = "redis://overlay/0"')
    environ = {"RQ_MODELS_ENV": "prod", "REDIS_URL": "redis://environ/0"}
    assert Settings.load(folder, environ={}).redis_url.endswith("6379/3")
    assert Settings.load(folder, environ={"RQ_MODELS_ENV": "prod"}).redis_url == "redis://overlay/0"
    assert Settings.load(folder, environ=environ).redis_url == "redis://environ/0"
    assert Settings.load(folder, redis_url="redis://option/0", environ=environ).redis_url == "redis://option/0"


def test_rq_models_config_names_another_folder(folder: Path) -> None:
    settings = Settings.load(environ={"RQ_MODELS_CONFIG": str(folder)})
    assert settings.root == folder.parent


def test_no_password_is_ever_shown(folder: Path) -> None:
    settings = load(folder)
    assert settings.masked_url == "redis://:***@127.0.0.1:6379/3"
    assert "hunter2" not in repr(settings) + str(settings)
    assert mask_url("rediss://me:secret@host/0?password=again&db=1") == "rediss://me:***@host/0?password=***&db=1"
    (folder / "base.toml").write_text(BASE.replace("redis://", "http://"))
    assert "hunter2" not in complaint(folder)


def test_env_values_are_secrets(folder: Path) -> None:
    (folder / "base.toml").write_text(BASE + 'env = {TOKEN = "hunter2"}\n')
    assert "hunter2" not in repr(load(folder))
    (folder / "base.toml").write_text(BASE + 'env = {TOKEN = ["hunter2"]}\n')
    assert "hunter2" not in complaint(folder)


def test_an_interpreter_path_starts_at_the_root_and_keeps_its_links(folder: Path) -> None:
    (folder / "base.toml").write_text(BASE + 'python = ".venv-old/bin/python"\n')
    assert load(folder).model("iris_model").python == str(folder.parent / ".venv-old/bin/python")


@pytest.mark.parametrize(
    ("line", "key", "remedy"),
    [
        ("job_timout = 3", "models.iris_model.job_timout", "did you mean 'job_timeout'?"),
        ("quux = 3", "models.iris_model.quux", "known keys: class, python"),
        ("workers = 'two'", "models.iris_model.workers", "expected a whole number, got 'two'"),
        ("workers = 0", "models.iris_model.workers", "expected greater than or equal to 1, got 0"),
        ("preload = 1", "models.iris_model.preload", "expected true or false, got 1"),
        ("retry_on = 'KeyError'", "models.iris_model.retry_on", "expected a list in square brackets"),
        ("swap = 'later'", "models.iris_model.swap", "'restart' or 'overlap'"),
        ("job_timeout = -5", "models.iris_model.job_timeout", "expected greater than 0, got -5"),
        ("max_memory = '2 gigs'", "models.iris_model.max_memory", 'expected a size such as "2GB"'),
        ("max_memory = 0", "models.iris_model.max_memory", "expected greater than 0, got 0"),
        ("max_memory = true", "models.iris_model.max_memory", "expected a whole number"),
        ("max_queued = 0", "models.iris_model.max_queued", "expected greater than or equal to 1, got 0"),
        ("max_queued = 'many'", "models.iris_model.max_queued", "expected a whole number, got 'many'"),
        ("max_input_bytes = 1e6", "models.iris_model.max_input_bytes", "expected a whole number, got 1000000.0"),
        ("max_input_bytes = 67108865", "models.iris_model.max_input_bytes", "less than or equal to 67108864"),
        ("max_output_bytes = 0", "models.iris_model.max_output_bytes", "expected greater than or equal to 1, got 0"),
    ],
)
def test_a_wrong_key_or_type_names_file_key_and_remedy(folder: Path, line: str, key: str, remedy: str) -> None:
    (folder / "base.toml").write_text(f"{BASE}{line}\n")
    said = complaint(folder)
    assert said.startswith(f"{folder / 'base.toml'}: {key}")
    assert remedy in said


@pytest.mark.parametrize(("written", "size"), [("4096", 4096), ("'512MB'", 512 << 20), ("'2 GB'", 2 << 30)])
def test_a_size_has_a_unit_or_is_in_bytes(folder: Path, written: str, size: int) -> None:
    (folder / "base.toml").write_text(f"{BASE}max_memory = {written}\n")
    assert load(folder).model("iris_model").max_memory == size


def test_the_file_named_is_the_one_whose_value_counts(folder: Path) -> None:
    (folder / "dev.toml").write_text("[models.iris_model]\nworkers = 'two'\n")
    assert complaint(folder, RQ_MODELS_ENV="dev").startswith(str(folder / "dev.toml"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[models.iris_model]\nworkers = 1", "models.iris_model has no 'class'; add class ="),
        ("[models.iris_model]\nclass = 'iris_model'", 'expected "package.module:Class"'),
        ("[models.iris_model]\nclass = 3", "models.iris_model.class: expected a text in quotes, got 3"),
        ("[models]\niris_model = 3", "models.iris_model: expected a table, got 3"),
        ("models = 3", "models: expected a table, got 3"),
        ("redis_urll = 'x'", "redis_urll: unknown key; did you mean 'redis_url'?"),
        ("root = 'x'", "unknown key 'root'"),
        ("redis_url = 'localhost'", "redis_url is no Redis address"),
        ("redis_url = 'redis://:2024/word@host:6379/0'", "redis_url has a password with /, ? or # in it"),
        ("redis_url = 'redis://to#ken@host'", "write them as %2F, %3F and %23"),
        ("redis_url = ", "not TOML"),
        ("[models.'a b']\nclass = 'a:B'", "'a b'"),
        ("[models.'a.b']\nclass = 'a:B'", "letters, digits, '_' and '-'"),
        ("[models.ModelJob]\nclass = 'a:B'", "models.ModelJob: the name is taken by rq_models.jobs"),
        ("[models.__name__]\nclass = 'a:B'", "is taken"),
    ],
)
def test_a_broken_file_is_one_clear_line(folder: Path, text: str, says: str) -> None:
    (folder / "base.toml").write_text(text)
    assert says in complaint(folder)


def test_a_missing_file_says_what_to_do(tmp_path: Path, folder: Path) -> None:
    assert "rq-models init" in complaint(tmp_path / "nowhere")
    assert "RQ_MODELS_ENV is 'prod'" in complaint(folder, RQ_MODELS_ENV="prod")


def test_an_unknown_model_names_the_configured_ones(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="has: iris_model"):
        load(folder).model("churn")


def test_a_message_can_name_the_file_of_a_value_later(folder: Path) -> None:
    assert load(folder).where("iris_model", "class") == f"{folder / 'base.toml'}: models.iris_model.class"


def test_every_key_of_the_configuration_is_in_the_readme() -> None:
    from rq_models.settings import ModelSettings

    readme = Path(__file__).parents[2].joinpath("README.md").read_text("utf-8")
    keys = {field.alias or name for name, field in ModelSettings.model_fields.items()}
    assert {key for key in keys if f"`{key}`" not in readme and f"\n{key} = " not in readme} == set()
