"""`saefty list`: every kind has names, and a misspelt kind the nearest."""

import importlib

import pytest

from saefty.catalogue import REGISTRIES, names_of
from saefty.errors import UnknownNameError


@pytest.mark.parametrize("kind", REGISTRIES)
def test_every_kind_lists_what_its_registry_holds(kind):
    module, name = REGISTRIES[kind]
    registry = getattr(importlib.import_module(module), name)
    names = names_of(kind)
    assert names == sorted(names)
    assert names
    assert all(registry[one] for one in names)


def test_a_kind_that_is_misspelt_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'saes'"):
        names_of("sae")
