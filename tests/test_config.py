from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field, model_validator

from saefty.config import Config, build_config, config_tree, differing_keys, load_config
from saefty.errors import ConfigError


class Sae(Config):
    """An SAE."""

    ALIASES: ClassVar[dict[str, str]] = {"topk": "k"}
    k: int = Field(default=64, gt=0)
    """Latents."""
    arch: Literal["topk", "relu"] = "topk"
    """Kind."""
    lr: float = 3e-4
    """Rate."""
    widths: int | tuple[int, ...] = 8
    """Widths."""
    options: dict[str, float] = Field(default_factory=dict)
    """Options."""


class Model(Config):
    """A model."""

    name: str
    """Its name."""
    cache: Path | None = None
    """Its folder."""


class Root(Config):
    """All."""

    ALIASES: ClassVar[dict[str, str]] = {"layers": "train.layers"}

    class Train(Config):
        """Training."""

        layers: tuple[int, ...] = ()
        """Blocks."""

    sae: Sae = Sae()
    """SAE."""
    train: Train = Train()
    """Training."""
    model: Model | None = None
    """Model."""


def refused(*words: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(Root, path, words)
    return str(error.value)


def test_words_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("sae:\n  k: 8\n  lr: 0.1\n")
    cfg = load_config(Root, path, ["sae.k=16"])
    assert (cfg.sae.k, cfg.sae.lr, cfg.sae.arch) == (16, 0.1, "topk")


def test_a_number_that_yaml_reads_as_text_becomes_a_number():
    assert load_config(Root, None, ["sae.lr=1e-3"]).sae.lr == 1e-3


def test_aliases_at_the_top_and_inside_a_section_reach_their_keys():
    cfg = load_config(Root, None, ["layers=[0,2,4]", "sae.topk=32"])
    assert cfg.train.layers == (0, 2, 4)
    assert cfg.sae.k == 32


def test_an_alias_and_its_key_with_different_values_are_refused():
    with pytest.raises(ConfigError, match="another word for sae.k.*32 and 16"):
        load_config(Root, None, ["sae.topk=32", "sae.k=16"])


def test_a_misspelt_key_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="sae.topkk: no such key.*Did you mean 'sae.topk'"):
        load_config(Root, None, ["sae.topkk=3"])


def test_a_key_in_the_wrong_section_is_answered_with_its_own():
    with pytest.raises(ConfigError, match=r"sae.layers: no such key. Did you mean 'train.lay"):
        load_config(Root, None, ["sae.layers=3"])


def test_what_a_whole_configuration_lacks_is_said_without_the_name_of_a_class():
    class Either(Config):
        """One of two."""

        @model_validator(mode="after")
        def _one(self) -> "Either":
            raise ValueError("set a or b")

    with pytest.raises(ConfigError) as error:
        load_config(Either, None, [])
    assert "set a or b" in str(error.value)
    assert "Either" not in str(error.value)


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(Root, None, ["sae.k=abc", "sae.arch=foo", "trian=1"])
    message = str(error.value)
    assert "sae.k: " in message
    assert "got 'abc'" in message
    assert "sae.arch: " in message
    assert "got 'foo'" in message
    assert "trian: no such key. Did you mean 'train'?" in message


def test_a_word_without_equals_is_refused_with_an_example():
    with pytest.raises(ConfigError, match=r"'sae\.k' is not of the form KEY=VALUE"):
        load_config(Root, None, ["sae.k"])


def test_the_resolved_configuration_rebuilds_itself():
    cfg = load_config(Root, None, ["layers=[1]", "sae.k=3"])
    assert build_config(Root, config_tree(cfg)) == cfg


def test_a_configuration_makes_no_objects_and_fills_in_no_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "canary")
    path = tmp_path / "shared.yaml"
    path.write_text("model: {name: '${oc.env:SECRET}/$SECRET'}")
    assert load_config(Root, path).model.name == "${oc.env:SECRET}/$SECRET"
    path.write_text("model: {name: a, _target_: os.system}")
    assert "model._target_: no such key" in refused(path=path)


@pytest.mark.parametrize(
    "text",
    ["a: &x [1]\nb: *x", "!!python/object/apply:os.system ['true']", "[" * 40 + "]" * 40],
    ids=["alias", "tag", "depth"],
)
def test_yaml_that_could_run_code_or_explode_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Root, path)


def test_differing_keys_are_named_with_both_values():
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3"]


def test_a_section_given_a_value_says_which_key_to_set():
    assert refused("model=llama") == (
        "model: a section of keys, not a value. Set its keys, such as model.name=llama"
    )
    assert "model is a section of keys, but it was given the value 'llama'" in refused(
        "model=llama", "model.name=x"
    )


def test_a_required_key_of_a_section_that_is_not_there_is_named_in_full():
    class Needs(Config):
        """Needs a model."""

        model: Model
        """Model."""

    with pytest.raises(ConfigError, match=r"^model\.name: required, but not given$"):
        build_config(Needs, {})


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert "nowhere.yaml: No such file or directory" in refused(path=tmp_path / "nowhere.yaml")


def test_keys_of_a_section_that_may_be_left_out_are_known():
    assert "Did you mean 'model.name'?" in refused("model.nam=llama")


@pytest.mark.parametrize("text", ["yes", "2024", "1e3", "2024-01-31"])
def test_a_word_for_a_key_of_text_is_taken_as_it_is_written(text):
    cfg = load_config(Root, None, [f"model.name={text}", f"model.cache={text}"])
    assert (cfg.model.name, cfg.model.cache) == (text, Path(text))
    assert load_config(Root, None, ["model.name=x", "model.cache=null"]).model.cache is None


def test_a_file_in_which_yaml_reads_no_text_is_told_to_quote(tmp_path):
    (tmp_path / "c.yaml").write_text("model: {name: yes}\n")
    assert refused(path=tmp_path / "c.yaml") == (
        "model.name: should be text, got True. Put it in quotes, so that YAML takes it as it is "
        "written"
    )


def test_one_number_stands_for_a_list_of_one():
    cfg = load_config(Root, None, ["layers=3", "sae.widths=16"])
    assert cfg.train.layers == (3,)
    assert cfg.sae.widths == 16


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sae.k=0", "sae.k: should be integer > 0, got 0"),
        ("sae.arch=topc", "sae.arch: should be topk or relu, got 'topc'. Did you mean 'topk'?"),
        ("sae.widths=wide", "sae.widths: should be integer or [integer, …], got 'wide'"),
        ("sae.options.l1=x", "sae.options.l1: should be number, got 'x'"),
        ("layers=[0,a]", "train.layers.1: should be [integer, …], got 'a'"),
    ],
)
def test_a_wrong_value_is_said_once_with_what_may_be_written(word, message):
    assert refused(word) == message


def test_a_mapping_without_a_space_after_the_colon_is_explained():
    assert refused("sae.options={l1:3}") == (
        "sae.options: {l1:3} names a key 'l1:3' without a value.\n"
        "Write sae.options.l1=3, or a space after the colon in quotes: sae.options='{l1: 3}'."
    )


@pytest.mark.parametrize("text", ["{caa: A, sae_ts: B, caa: C}", "sae: {k: 1, k: 1}"])
def test_a_key_that_stands_twice_is_refused_where_yaml_would_take_the_last(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert "stands there 2 times" in refused(path=path)
    assert "stands there 2 times" in refused(f"sae.options={text}")
