"""Pictures with questions: what is true of them, and that neither half alone gives it away."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from saefty.data.base import DataSection, load_examples
from saefty.sandbox.vision_world import (
    CELL_SHARES,
    COLOURS,
    VisionWorld,
    read_scenes,
    write_scenes,
)

WORLD = VisionWorld(seed=0)


@pytest.fixture(scope="module")
def asked():
    return WORLD.scenes(1024, seed=5, split="held_out")


def auroc(x, scenes):
    """AUROC of a linear classifier on quartets that it did not learn from."""
    harmful = [scene.harmful for scene in scenes]
    quartets = [scene.quartet for scene in scenes]
    model = LogisticRegression(C=0.1, max_iter=2000)
    scores = cross_val_predict(
        model, x, harmful, groups=quartets, cv=GroupKFold(4), method="decision_function"
    )
    return roc_auc_score(harmful, scores)


def test_harm_is_one_of_the_two_classes_but_not_both(asked):
    for scene in asked[:64]:
        weapon = scene.noun in WORLD.nouns[1]
        warm = scene.colour in COLOURS[1]
        assert scene.harmful == (weapon != warm)
        assert (scene.answer.split()[0] == "stop") == scene.harmful
        assert scene.noun in scene.question.split()


def test_every_colour_and_every_noun_is_harmful_as_often_as_not_in_every_quartet(asked):
    seen = defaultdict(list)
    for scene in asked:
        for name in (scene.colour, scene.noun):
            seen[scene.quartet, name].append(scene.harmful)
    assert {np.mean(harmful) for harmful in seen.values()} == {0.5}
    assert {name for _, name in seen} == {*COLOURS[0], *COLOURS[1], *WORLD.nouns[0],
                                          *WORLD.nouns[1]}  # fmt: skip


def test_the_words_of_a_question_do_not_tell_harm(asked):
    words = CountVectorizer(ngram_range=(1, 2)).fit_transform([one.question for one in asked])
    assert 0.4 < auroc(words, asked) < 0.6


def test_the_pixels_of_a_picture_do_not_tell_harm(asked):
    pixels = np.stack([scene.image.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)) for scene in asked])
    assert 0.4 < auroc(pixels.reshape(len(asked), -1) / 255, asked) < 0.6


def test_words_and_colour_together_do(asked):
    classes = np.array([[scene.colour_class, scene.noun_class] for scene in asked]) - 0.5
    assert auroc(classes.prod(axis=1, keepdims=True), asked) == 1.0
    assert 0.4 < auroc(classes, asked) < 0.6


def test_the_class_of_a_colour_is_linear_in_the_pixels(asked):
    for scene in asked:
        red, _, blue = scene.image.astype(float).mean(axis=(0, 1))
        assert (red > blue) == bool(scene.colour_class)


def test_no_held_out_pair_is_shown_in_training_and_together_they_are_all():
    sides = {
        split: {(s.colour, s.noun) for s in WORLD.scenes(256, seed=1, split=split)}
        for split in ("train", "held_out")
    }
    assert not sides["train"] & sides["held_out"]
    colours, nouns = (sum(map(len, both)) for both in (COLOURS, WORLD.nouns))
    assert len(sides["train"]) == len(sides["held_out"]) == colours * nouns // 2


def test_another_world_holds_out_other_pairs():
    first, second = (
        {(s.colour, s.noun) for s in VisionWorld(seed).scenes(256, seed=1, split="held_out")}
        for seed in (0, 1)
    )
    assert 0.2 < len(first & second) / len(first) < 0.8


def test_training_shows_the_cells_in_skewed_shares():
    scenes = WORLD.scenes(2000, seed=2, balanced=False)
    counts = Counter((scene.colour_class, scene.noun_class) for scene in scenes)
    shares = [counts[cell] / 2000 for cell in ((0, 0), (0, 1), (1, 0), (1, 1))]
    np.testing.assert_allclose(shares, CELL_SHARES, atol=0.04)


def test_the_same_seed_draws_the_same_pictures_and_another_seed_others():
    a, b, c = (WORLD.scenes(8, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(x.image, y.image) for x, y in zip(a, b, strict=True))
    assert [scene.question for scene in a] == [scene.question for scene in b]
    assert not any(np.array_equal(x.image, y.image) for x, y in zip(a, c, strict=True))


def test_every_word_of_a_question_and_an_answer_is_in_the_vocabulary(asked):
    said = {word for scene in asked for word in (scene.question + " " + scene.answer).split()}
    assert said <= set(WORLD.vocabulary)
    assert len(set(WORLD.vocabulary)) == len(WORLD.vocabulary)


def test_balanced_scenes_come_in_fours():
    with pytest.raises(ValueError, match="fours, but 6"):
        WORLD.scenes(6, seed=0)


def test_what_is_written_is_read_as_a_dataset_with_pictures(tmp_path):
    scenes = WORLD.scenes(8, seed=6)
    table = write_scenes(scenes, tmp_path)
    columns = {name: name for name in ("id", "prompt", "image", "label", "group")}
    examples = load_examples(DataSection(path=str(table), **columns))
    assert [one.label for one in examples] == [scene.harmful for scene in scenes]
    assert [one.group for one in examples] == [scene.quartet for scene in scenes]
    for example, scene in zip(examples, scenes, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(example.image)), scene.image)
    assert [one["colour"] for one in read_scenes(table)] == [scene.colour for scene in scenes]
