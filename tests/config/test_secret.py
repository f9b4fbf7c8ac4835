"""A secret is shown as `<secret>`, however it comes into a configuration and whoever asks."""

import copy
import json
import pickle
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from distkit import Secret as PublicSecret
from distkit import errors
from distkit.cli import parse
from distkit.config import Constant, TrainConfig, to_json
from distkit.config.secret import Secret, check_secrets, is_secret, secrets_of, variable
from distkit.errors import MASK, ConfigError, masked

TOKEN = "hf_Zq81-never-shown"


@pytest.fixture(autouse=True)
def _other_tests_see_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of other tests may have these words."""
    monkeypatch.setattr(errors, "_secrets", set(errors._secrets))


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """A section with a secret."""

    key: Secret | None = None
    """Key of the store."""


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """With secrets."""

    hub_token: Secret | None = None
    """Token of the hub."""
    keys: tuple[Secret, ...] = ()
    """Keys."""
    pair: tuple[Secret, Secret] | None = None
    """Name and password."""
    store: StoreConfig = StoreConfig()
    """The store."""


BASE = Config(num_steps=1, schedule=Constant())


def parsed(*argv: str, presets: dict[str, Config] | None = None) -> Config:
    return parse(Config, presets or {"default": BASE}, argv, "recipe.py", "A recipe.")


def test_it_shows_nothing_and_gives_its_text() -> None:
    secret = Secret(TOKEN)
    assert [str(secret), repr(secret), f"{secret}", f"{secret!r:>4}"] == [MASK] * 4
    assert secret.reveal() == TOKEN
    assert TOKEN not in repr(replace(BASE, hub_token=secret, store=StoreConfig(key=secret)))
    assert json.loads(json.dumps({"token": secret}, default=str)) == {"token": MASK}
    assert PublicSecret is Secret


def test_it_goes_to_other_processes() -> None:
    for again in (pickle.loads(pickle.dumps(Secret(TOKEN))), copy.deepcopy(Secret(TOKEN))):
        assert again == Secret(TOKEN)
        assert hash(again) == hash(Secret(TOKEN))
        assert again != Secret("another")
        assert again != TOKEN


def test_only_text_is_taken() -> None:
    with pytest.raises(ConfigError, match="got:      int"):
        Secret(3)  # type: ignore[arg-type]


def test_flags_the_environment_and_presets_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed("--hub-token", TOKEN).hub_token == Secret(TOKEN)
    assert parsed("--keys", "key-one", "key-two").keys == (Secret("key-one"), Secret("key-two"))
    assert parsed("--store.key=stored").store.key == Secret("stored")
    preset = replace(BASE, hub_token=Secret("preset"))
    assert parsed(presets={"default": preset}).hub_token == Secret("preset")
    assert parsed("--hub-token", "None", presets={"default": preset}).hub_token is None
    monkeypatch.setenv(variable("hub_token"), "environment")
    monkeypatch.setenv("DISTKIT_SECRET_STORE_KEY", "store")
    monkeypatch.setenv("DISTKIT_SECRET_KEYS", "first second")
    config = parsed(presets={"default": preset})
    assert (config.hub_token, config.store.key) == (Secret("environment"), Secret("store"))
    assert config.keys == (Secret("first"), Secret("second"))
    assert parsed("--hub-token", "typed").hub_token == Secret("typed")


def test_a_file_leaves_it_out_and_it_is_given_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(variable("hub_token"), raising=False)
    file = tmp_path / "config.json"
    secrets = replace(BASE, hub_token=Secret(TOKEN), keys=(Secret("key-one"), Secret("key-two")))
    file.write_text(json.dumps(to_json(secrets)))
    assert TOKEN not in file.read_text()
    assert "key-one" not in file.read_text()
    flags = ["--config", str(file)]
    config = parsed(*flags)  # for what needs no secret, such as the weights of a run
    with pytest.raises(ConfigError, match="no file holds it"):
        config.hub_token.reveal()  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="type:     export DISTKIT_SECRET_HUB_TOKEN=VALUE, or --hub-token VALUE"):
        check_secrets(config)
    with pytest.raises(ConfigError, match="--keys is a secret"):
        check_secrets(parsed(*flags, "--hub-token", TOKEN))
    again = parsed(*flags, "--hub-token", TOKEN, "--keys", "first", "second")
    check_secrets(again)
    assert again.hub_token == Secret(TOKEN)
    monkeypatch.setenv(variable("hub_token"), TOKEN)
    assert parsed(*flags).hub_token == Secret(TOKEN)
    monkeypatch.delenv(variable("hub_token"))
    assert parsed(*flags, presets={"default": replace(BASE, hub_token=Secret("preset"))}).hub_token == Secret("preset")


WRONG = {
    "two words": ["--hub-token", "hf_Zq81", "-never-shown"],
    "two words after a sign": ["--hub-token=hf_Zq81", "-never-shown"],
    "too few": ["--pair", TOKEN],
    "a word too many": ["--pair", "a", "b", TOKEN],
    "an unknown option": ["--hub-tokn", TOKEN],
    "an unknown option with a sign": [f"--hub-tokn={TOKEN}"],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_value_is_not_echoed(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(*WRONG[kind])
    assert "--pair" in str(caught.value) or "--hub-tok" in str(caught.value)
    assert "Zq81" not in str(caught.value)
    assert "never-shown" not in str(caught.value)


def test_help_does_not_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    preset = replace(BASE, hub_token=Secret(TOKEN), keys=(Secret("key-one"),))
    with pytest.raises(SystemExit):
        parsed("--help", "all", presets={"default": preset})
    shown = capsys.readouterr().out
    assert "--hub-token <secret>" in shown
    assert TOKEN not in shown
    assert "key-one" not in shown


def test_plain_text_in_its_place_is_refused() -> None:
    plain = replace(BASE, hub_token=TOKEN)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"hub_token=Secret\(…\)") as caught:
        check_secrets(plain)
    assert TOKEN not in str(caught.value)
    with pytest.raises(ConfigError, match="preset default has an invalid value for hub_token") as caught:
        parsed(presets={"default": plain})
    assert TOKEN not in str(caught.value)
    with pytest.raises(ConfigError, match=r"the secret store\.key is a plain str"):
        check_secrets(replace(BASE, store=StoreConfig(key="k")))  # type: ignore[arg-type]


def test_types() -> None:
    assert [is_secret(kind) for kind in (Secret, Secret | None, tuple[Secret, ...], str, None)] == [
        True, True, True, False, False,
    ]  # fmt: skip

    X = Secret("inner")  # noqa: N806

    @dataclass(frozen=True, kw_only=True)
    class Inner(TrainConfig):
        token: "Secret | Nowhere" = X  # type: ignore[name-defined]  # noqa: F821

    assert list(secrets_of(Inner(num_steps=1))) == [("token", Secret("inner"))]


def test_texts_of_others_are_searched() -> None:
    Secret("long-enough-1"), Secret("long-enough-12")
    assert masked("401 for long-enough-12, then long-enough-1; abc") == f"401 for {MASK}, then {MASK}; abc"


def test_a_secret_is_found_as_tracebacks_and_urls_quote_it() -> None:
    value = "two\nlines+and/more="
    Secret(value)
    for text in (value, repr(value), "https://hub/?token=two%0Alines%2Band%2Fmore%3D"):
        assert "lines" not in masked(f"403 for {text}"), text
