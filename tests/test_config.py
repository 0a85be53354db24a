from typing import ClassVar, Literal

import pytest
from pydantic import Field

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


def test_all_problems_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_config(Root, None, ["sae.k=abc", "sae.arch=foo", "trian=1"])
    message = str(error.value)
    assert "sae.k: " in message
    assert "got 'abc'" in message
    assert "sae.arch: " in message
    assert "got 'foo'" in message
    assert "trian: no such key in Root. Did you mean 'train'?" in message


def test_a_word_without_equals_is_refused_with_an_example():
    with pytest.raises(ConfigError, match=r"'sae\.k' is not of the form KEY=VALUE"):
        load_config(Root, None, ["sae.k"])


def test_the_resolved_configuration_rebuilds_itself():
    cfg = load_config(Root, None, ["layers=[1]", "sae.k=3"])
    assert build_config(Root, config_tree(cfg)) == cfg


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
