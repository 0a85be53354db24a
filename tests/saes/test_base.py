import pytest

from saefty.errors import ConfigError, UnknownNameError
from saefty.saes.base import SaeConfig, SaeSection


def test_one_value_of_each_key_is_one_sae():
    (config,) = SaeSection(k=8, expansion_factor=2).configs(d_in=16)
    assert (config.d_in, config.d_sae, config.k) == (16, 32, 8)


def test_lists_are_trained_in_all_combinations():
    configs = SaeSection(k=(4, 8), expansion_factor=(2, 4)).configs(d_in=16)
    assert [(c.d_sae, c.k) for c in configs] == [(32, 4), (32, 8), (64, 4), (64, 8)]


def test_d_sae_overrides_the_expansion_factor():
    (config,) = SaeSection(k=4, d_sae=100).configs(d_in=16)
    assert config.d_sae == 100


def test_more_firing_latents_than_latents_are_refused():
    with pytest.raises(ConfigError, match=r"sae\.k is 64, but the SAE has only 32 latents"):
        SaeSection(k=64, expansion_factor=2).configs(d_in=16)


@pytest.mark.parametrize("value", [0, -1, (4, 0), (), (4, 4)])
def test_a_k_that_makes_no_sense_is_refused(value):
    with pytest.raises(ValueError, match=r"above 0|stands twice"):
        SaeSection(k=value)


def test_an_unknown_architecture_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'topk'"):
        SaeConfig("topkk", 4, 8, 2).build()


def test_half_of_d_in_dead_latents_learn_unless_said_otherwise():
    assert SaeConfig("topk", 10, 20, 2).build().aux_k == 5
    assert SaeConfig("topk", 10, 20, 2, aux_k=0).build().aux_k == 0
