"""`saefty steer vector` on the command line: what each method makes, needs and refuses."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny_models
from saefty import fsio
from saefty.cli import app
from saefty.interventions.vectors import load_vector
from saefty.records import Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae
from saefty.stages.steer_vector import CONTRASTS, NEEDS, TAKES, flag_of
from saefty.steering_vectors import random_vector

SITE = Site(1)
D = tiny_models.D_MODEL


def random_sae():
    sae = SaeConfig(arch="topk", d_in=D, d_sae=48, k=6).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    sae.site = SITE
    return sae


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_sae(random_sae(), folder / "sae")
    for name, texts in {"pos": ["the lazy dog", "a robot"], "neg": ["Mix flour"]}.items():
        lines = "".join(fsio.dump_json_line({"text": text}) for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


class TestMakingOne:
    """`saefty steer vector` on the command line."""

    def made(self, *words):
        return CliRunner().invoke(app, ["steer", "vector", *map(str, words)])

    def test_decoder_caa_and_random_ones_are_made(self, world):
        sae, out = world / "sae", world / "decoder"
        done = self.made("--method", "decoder", "--sae", sae, "--latent", "3:2,9", "--out", out,
                         "--export", world / "d.npy")  # fmt: skip
        assert done.exit_code == 0, done.output
        expected = (2 * random_sae().W_dec[3] + random_sae().W_dec[9]).detach().numpy()
        np.testing.assert_allclose(np.load(world / "d.npy"), expected, atol=1e-6)
        model = tiny_models.folder_of("llama")
        sides = ("--positive", world / "pos.jsonl", "--negative", world / "neg.jsonl")
        for method, more in (("caa", ("--layer", 1)), ("latent_difference", ("--sae", sae))):
            done = self.made("--method", method, "--model", model, *sides, *more, "--out",
                             world / method, "--json")  # fmt: skip
            assert done.exit_code == 0, done.output
            assert json.loads(done.stdout)["figures"]["norms"]["residual"] > 0
        done = self.made("--method", "random", "--like", world / "caa", "--out", world / "r")
        assert done.exit_code == 0, done.output

    @pytest.mark.parametrize(
        ("words", "code", "message"),
        [
            (("--method", "decoder", "--latent", "3"), 2, "needs --sae"),
            (("--method", "sae_ts"), 2, "needs --effects and --latent"),
            (("--method", "caa", "--model", "x"), 2, "needs --layer"),
            (("--method", "nonsense"), 2, "--method: should be decoder, caa"),
            (("--method", "sae_ts", "--penalty", "-1"), 2, "--penalty: should be number > 0"),
            (
                ("--method", "caa", "--layer", "1", "--model", "x", "--hook-point", "foo"),
                2,
                "--hook-point: should be",
            ),
            (
                ("--method", "caa", "--layer", "1", "--model", "x", "--export", "v.txt"),
                2,
                "not as v.txt",
            ),
        ],
    )
    def test_what_is_missing_is_named(self, world, words, code, message):
        done = self.made(*words, "--out", world / "x")
        assert done.exit_code == code
        assert message in done.output

    def test_one_side_of_a_contrast_is_refused_with_both_counts(self, world):
        done = self.made("--method", "caa", "--layer", 1, "--model", tiny_models.folder_of("llama"),
                         "--positive", world / "pos.jsonl", "--out", world / "x")  # fmt: skip
        assert done.exit_code == 3
        assert "2 positive and 0 negative" in done.output

    def test_a_latent_out_of_range_is_named(self, world):
        done = self.made("--method", "decoder", "--sae", world / "sae", "--latent", 48, "--out",
                         world / "x")  # fmt: skip
        assert done.exit_code == 2
        assert "latent 48 does not exist" in done.output

    def test_a_place_that_holds_no_vector_is_refused_before_the_model_is_read(self, world):
        done = self.made("--method", "caa", "--layer", 1, "--model", "nowhere", "--out", "v.json")
        assert done.exit_code == 2
        assert "not as v.json" in done.output

    def test_a_random_one_is_none_of_those_of_a_comparison(self, world):
        drawn = random_vector(D, SITE, seed=0)
        assert not torch.equal(drawn.values, random_vector(D, SITE, seed=0, draw=1).values)
        assert not (world / "x").exists()

    def test_both_contrasts_take_the_same_tokens_where_nobody_says_which(self, world):
        """The mean over a text's tokens, as by asking for it; `last` is another vector."""
        model, sae = tiny_models.folder_of("llama"), world / "sae"
        sides = ("--positive", world / "pos.jsonl", "--negative", world / "neg.jsonl")
        for method, more in (("caa", ("--layer", 1)), ("latent_difference", ("--sae", sae))):
            found = []
            for n, pooling in enumerate(((), ("--pooling", "mean"), ("--pooling", "last"))):
                out = world / f"pooled_{method}_{n}"
                done = self.made("--method", method, "--model", model, *sides, *more, *pooling,
                                 "--out", out)  # fmt: skip
                assert done.exit_code == 0, done.output
                found.append(load_vector(out).values)
            assert torch.equal(found[0], found[1])
            assert not torch.allclose(found[0], found[2])

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (("decoder", "--sae", "s", "--latent", "3", "--lambda", "2"), "--lambda would"),
            (("decoder", "--sae", "s", "--latent", "3", "--positive", "p"), "--positive would"),
            (("caa", "--model", "m", "--layer", "1", "--top", "3", "--like", "v"),
             "--like and --top would"),
            (("random", "--like", "v", "--pooling", "mean"), "--pooling would"),
            (("random", "--like", "v", "--texts", "t"), "--texts without --model"),
            (("sae_ts", "--effects", "e", "--latent", "3", "--fit", "descent", "--penalty", "1"),
             "--penalty with --fit descent would"),
            (("random", "--like", "v", "--dtype", "float32"), "there is no --model"),
        ],
    )  # fmt: skip
    def test_what_would_do_nothing_is_refused_by_its_flag(self, world, words, named):
        done = self.made("--method", *words, "--out", world / "x")
        assert done.exit_code == 2
        assert named in done.output

    def test_a_bare_vector_has_its_place_by_flags(self, world):
        np.save(world / "bare.npy", np.ones(D, np.float32))
        given = ("--method", "random", "--like", world / "bare.npy", "--out", world / "like")
        refused = self.made(*given)
        assert refused.exit_code == 2
        assert "--layer 20" in refused.output
        assert self.made(*given, "--layer", 2).exit_code == 0
        assert load_vector(world / "like").site == Site(2)

    def test_a_file_that_is_missing_is_told_without_keys(self, world):
        done = self.made("--method", "caa", "--layer", 1, "--model", tiny_models.folder_of("llama"),
                         "--positive", "none.jsonl", "--negative", world / "neg.jsonl", "--out",
                         world / "x")  # fmt: skip
        assert done.exit_code == 3
        assert "there is no file none.jsonl" in done.output
        assert "data.path" not in done.output

    @pytest.mark.parametrize("method", NEEDS)
    def test_the_help_says_what_each_method_needs_and_may_have(self, method):
        text = " ".join(self.made("--help").output.split()).replace("- ", "-")
        own = next(
            part
            for part in text.split(". ")
            if method in part.split(" need")[0] and " need" in part
        )
        sides = ["--positive", "--negative"] if method in CONTRASTS else []
        for flag in [*map(flag_of, NEEDS[method]), *sides]:
            assert flag in own
        everywhere = {"--layer", "--sae-id", "--norm", "--model", "--texts"}
        for flag in set(map(flag_of, TAKES[method])) - everywhere:
            assert flag in own or (method == "random" and flag == "--hook-point")
