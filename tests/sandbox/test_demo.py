"""What the demo leaves for commands of one's own: a model, and texts to steer it with."""

from saefty.sandbox.demo import STARTS, STORIES, keep_model, steering_texts
from saefty.sandbox.language_model import MODEL_FOLDER
from saefty.sandbox.world import World

WORLD = World(0)


def test_stories_to_learn_a_language_from_are_in_that_language_alone():
    texts = steering_texts(WORLD, seed=0)
    for name, language in (("french", "fr"), ("english", "en"), ("starts", "en")):
        own = WORLD.grammar.vocabulary(language).union(WORLD.grammar.shared)
        assert all(set(one["text"].split()) <= own for one in texts[name])


def test_a_start_is_the_first_sentence_of_a_story_that_no_vector_was_learned_from():
    texts = steering_texts(WORLD, seed=3)
    ids = {name: {one["id"] for one in found} for name, found in texts.items()}
    assert [len(ids[name]) for name in ("french", "english", "starts")] == [
        STORIES, STORIES, STARTS,
    ]  # fmt: skip
    assert not ids["starts"] & (ids["english"] | ids["french"])
    for one in texts["starts"]:
        words = one["text"].split()
        assert words.index(".") == len(words) - 1 > 1


def test_another_seed_gives_other_texts_and_the_same_seed_the_same():
    first, again, other = (steering_texts(WORLD, seed) for seed in (0, 0, 1))
    assert first == again
    assert not any(first[name] == other[name] for name in first)


def test_the_model_is_kept_byte_by_byte_and_a_model_that_lies_there_is_left_alone(tmp_path):
    kept = tmp_path / "model"
    keep_model(MODEL_FOLDER, kept)
    before = {one.name: one.read_bytes() for one in kept.iterdir()}
    assert before == {one.name: one.read_bytes() for one in MODEL_FOLDER.iterdir()}
    keep_model(kept, tmp_path / "other" / ".." / "model")
    assert {one.name: one.read_bytes() for one in kept.iterdir()} == before
