"""Why turning attention off may have had no effect, from what can be seen in batch and weights."""

from collections.abc import Sequence

from saefty.models.attention_off import cross_layers
from saefty.models.base import TokenBatch
from saefty.models.transformer import TransformerModel
from saefty.records import Site


def cause_of_no_effect(
    model: TransformerModel,
    batch: TokenBatch,
    site: Site,
    layers: Sequence[int],
    method: str,
    name: str = "extract",
) -> tuple[str, str]:
    """Return why δ may be zero at a site, and what to do then.

    Args:
        model: The model.
        batch: What was read.
        site: Where δ is zero.
        layers: What is off.
        method: How.
        name: The section of the settings that the advice names.
    """
    other_layers = f"Take other layers in {name}.layers."
    if method != "zero_attention" and not batch.image.any():
        return (
            f"No token of the {len(batch.items)} examples of the first batch stands for an image.",
            f"Set data.image to the column of the images, or {name}.contrast.method="
            "zero_attention for texts.",
        )
    if method == "knockout" and not (batch.image.cumsum(1) > 0)[batch.mask & ~batch.image].any():
        return (
            "No token of the text stands behind an image, so none attends to it.",
            "Put the image before the text in the prompt.",
        )
    before = [i for i in layers if i < site.layer + (site.part != "resid_pre")]
    if method == "cross_attention":
        before = [i for i in before if i in cross_layers(model.blocks)]
    if not before:
        return "Nothing before it is off.", other_layers
    gates = [
        parameter
        for i in before
        for name, parameter in model.blocks[i].named_parameters(recurse=False)
        if name == "cross_attn_attn_gate"
    ]
    if gates and not any(gate.any() for gate in gates):
        return (
            "The gate cross_attn_attn_gate of its cross-attention is 0, that is closed, so nothing "
            "of the image reaches the text.",
            "Use a trained checkpoint: in a new model all gates are closed.",
        )
    projector = [p for name, p in model.model.named_parameters() if "projector" in name]
    if method == "cross_attention" and projector and not any(p.any() for p in projector):
        return (
            "The projector of the image holds zeros alone, so there is nothing to attend to.",
            "Use a trained checkpoint.",
        )
    return "Its attention adds nothing: are its output weights zero?", other_layers
