"""What is shown of a run of `saefty tokens`: colours, pictures, commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from saefty import cli
from saefty.errors import ConfigError, MismatchError
from saefty.sentence_views import Palette, SentenceViews, positions_of
from token_place import K


def colours_of(data):
    """Return the colour of each latent in a picture, by row of tokens and latent."""
    return {
        (r, int(latent)): tuple(np.round(colour, 12))
        for r, row in enumerate(data.rows)
        for panel in row
        if panel is not None
        for latent, colour in zip(panel.ids, panel.colours, strict=True)
    }


def test_a_latent_has_one_colour_in_all_pictures_of_a_run(run):
    views = SentenceViews(run)
    of_layer = {}
    for sentence in range(7):
        for page in views.sentence(1, sentence, top_n=K):
            for (_, latent), colour in colours_of(page).items():
                assert of_layer.setdefault(latent, colour) == colour
    compared = colours_of(views.compare_tokens(1, 0, [1, 2, 3], top_n=K))
    layers = colours_of(views.compare_layers(0, [1, 2, 3], top_n=K))
    for (_, latent), colour in compared.items():
        assert of_layer[latent] == colour == layers[1, latent]


def test_no_two_latents_of_a_run_share_a_hue(run):
    palette = SentenceViews(run).palette
    hues = np.concatenate(
        [
            palette.hues(key, np.flatnonzero(numbers >= 0))
            for key, numbers in palette.numbers.items()
        ]
    )
    assert len(hues) > 100
    assert np.diff(np.sort(hues)).min() > 360 / len(hues) / 3


def test_kept_colours_are_those_worked_out_from_the_store(run):
    views = SentenceViews(run)
    kept, made = views.palette, Palette.of(views.store)
    for key in views.store.codes:
        np.testing.assert_array_equal(kept.numbers[key], made.numbers[key])
        np.testing.assert_array_equal(kept.scores[key], made.scores[key])


def test_rarer_latents_are_stronger_in_colour(run):
    palette = SentenceViews(run).palette
    ids = np.flatnonzero(palette.numbers[0] >= 0)
    order = np.argsort(palette.scores[0][ids])
    chroma = palette.chroma(0, ids)[order]
    assert (np.diff(chroma) <= 1e-12).all()
    assert chroma[0] > 0.1 and chroma[-1] < 0.03


def invoke(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    return done.exit_code, done.output


def test_the_views_are_commands(place, run, tmp_path):
    out = tmp_path / "tokens.svg"
    code, said = invoke(
        "compare-tokens", run, "--layer", 1, "--sentence", 0, "--tokens", "1,3-4", "--out", out
    )
    assert (code, said.strip()) == (0, str(out)) and "<svg" in out.read_text()
    code, said = invoke("compare-layers", run, "-s", 0, "-t", "1,2", "--layers", "0,1", "--dpi", 40)
    picture = Path(said.strip())
    assert code == 0 and picture.parent == run / "pictures" and picture.stat().st_size > 1000
    code, said = invoke("show-tokens", run, "--sentence", 1)
    assert code == 0 and said.splitlines()[0] == "sentence 1: Yes, it is."
    code, said = invoke("show-tokens", "--model", place.model, "--text", "東 x", "--json")
    (table,) = json.loads(said)
    assert [one["token_str"] for one in table["tokens"]][1:4] == ["<E6>", "<9D>", "<B1>"]
    assert table["tokens"][0]["role"] == "special"


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (
            ["compare-tokens", "{run}", "-l", "5", "-s", "0", "-t", "1"],
            "holds layers [0, 1], not 5",
        ),
        (["compare-tokens", "{run}", "-l", "0", "-s", "9", "-t", "1"], "sentences 0 to 6, not 9"),
        (["compare-tokens", "{run}", "-l", "0", "-s", "1", "-t", "0,99"], "not 0, 99"),
        (["compare-tokens", "{run}", "-l", "0", "-s", "1", "-t", "x"], "no list of positions"),
        (["compare-layers", "nowhere", "-s", "1", "-t", "1"], "no folder nowhere"),
        (["compare-layers", "{run}", "-s", "1", "-t", "1", "--out", "a.pdf"], "neither a .png"),
        (["show-tokens"], "takes a run, or --model and --text"),
    ],
)
def test_what_the_views_cannot_show_is_said(place, run, words, phrase):
    code, said = invoke(*(word.format(run=run) for word in words))
    assert code not in (0, 1), said
    assert phrase in said


def test_positions_are_numbers_and_ranges():
    assert positions_of("1, 4-6,9") == [1, 4, 5, 6, 9]
    with pytest.raises(ConfigError):
        positions_of("")


def test_a_layer_whose_name_is_no_number_is_refused_by_that_name(run):
    with pytest.raises(MismatchError, match="²"):
        SentenceViews(run).layer("²")
