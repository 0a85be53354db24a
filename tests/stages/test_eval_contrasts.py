"""eval of contrasts whose OFF state is computed while the model replies."""

import pytest

from saefty import fsio
from saefty.gating import Silencer
from saefty.models.contrast import ContrastSection
from saefty.models.live_contrast import LiveContrast
from saefty.records import Site, example_from
from saefty.saes.native import load_sae
from saefty.stores.activations import ActivationStore
from stages.test_eval_images import evaluate, made

WAYS = [("knockout", "per_layer"), ("knockout", "joint"), ("zero_attention", "joint")]


@pytest.fixture(scope="module", params=WAYS, ids=" ".join)
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrasts")
    return folder, made(folder, *request.param, layers="[0,1]"), *request.param


def test_latents_of_every_contrast_are_silenced_while_the_model_replies(world):
    folder, model, method, scope = world
    outcome = evaluate(folder, folder / "r", model, "eval.layers=[1]")
    gating = outcome.figures["layers"]["1"]["gating"]
    assert gating["site"] == "blocks.1.hook_post_attn_resid"
    assert outcome.figures["layers"]["1"]["gating_left_out"] is None
    assert gating["token_fit"]["tokens"] > 10
    report = (folder / "r" / "summary.md").read_text()
    said = "layer 1 is computed a second time" if scope == "per_layer" else "run a second time"
    assert said in report
    if method == "zero_attention":
        assert "with attention zero in the layers 0, 1," in report
    # The replies are those of a silencer that is told here what was off.
    ungated, silenced = (
        fsio.read_lines(folder / "r" / "intervention" / "layer_1" / name)
        for name in ("ungated.jsonl", "target_001.jsonl")
    )
    records = {one["example_id"]: one for one in ActivationStore(folder / "x").examples()}
    asked = [example_from(records[line["example_id"]]) for line in ungated]
    assert [one["reply"] for one in ungated] == model.generate(asked, max_new_tokens=2)
    contrast = ContrastSection(method=method, scope=scope)
    place = LiveContrast(Site(1, "post_attn_resid"), contrast, (0, 1))
    silencer = Silencer(load_sae(folder / "s" / "layer_1"), place.site, 1.0, None, place)
    with silencer.acting(model, [2]):
        assert [one["reply"] for one in silenced] == model.generate(asked, max_new_tokens=2)
