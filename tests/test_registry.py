import pytest

from saefty.errors import UnknownNameError
from saefty.registry import Registry


def test_a_misspelt_name_is_answered_with_the_nearest_and_the_list():
    registry = Registry[int]("shape", "email")
    registry.register("square")(4)
    registry.register("triangle")(3)
    with pytest.raises(UnknownNameError) as error:
        registry["sqare"]
    assert "no shape called 'sqare'. Did you mean 'square'? Known: square, triangle." in str(
        error.value
    )


def test_the_first_look_up_imports_the_modules_of_the_package():
    from saefty.saes.base import ARCHITECTURES

    assert {"topk", "batch_topk"} <= set(ARCHITECTURES)


def test_two_entries_of_one_name_are_refused():
    registry = Registry[int]("shape", "email")
    registry.register("square")(4)
    with pytest.raises(ValueError, match="two entries"):
        registry.register("square")(5)
