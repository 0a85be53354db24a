"""δ by two whole forward passes of the transformers model, with hooks and masks set here by hand.

No code of the package's contrast is used. Where a block's parts are comes from `family_truth`.
"""

from contextlib import ExitStack, contextmanager

import torch

from family_truth import NAMES, first

VLMS = {  # where the text model's blocks are, and which text family they are of
    "llava": ("model.language_model.layers", "llama"),
    "llava_next": ("model.language_model.layers", "llama"),
    "llava_onevision": ("model.language_model.layers", "qwen2"),
    "qwen2_vl": ("model.language_model.layers", "qwen2"),
    "qwen2_5_vl": ("model.language_model.layers", "qwen2"),
    "qwen3_vl": ("model.language_model.layers", "qwen3"),
    "gemma3": ("model.language_model.layers", "gemma3_text"),
    "paligemma": ("model.language_model.layers", "gemma"),
    "idefics3": ("model.text_model.layers", "llama"),
    "smolvlm": ("model.text_model.layers", "llama"),
    "mllama": ("model.language_model.layers", "llama"),
}


def blocks_of(model, family):
    """Return the blocks, and the names of the parts of one."""
    path, text = VLMS.get(family, (NAMES.get(family, [None])[0], family))
    return model.model.get_submodule(path), NAMES[text][1:]


def attention_of(model, family, layer):
    blocks, names = blocks_of(model, family)
    block = blocks[layer]
    return block.cross_attn if hasattr(block, "cross_attn") else getattr(block, names[0])


@contextmanager
def hooked(*handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def states(model, family, batch, part, layers):
    """Return what a whole pass computes at a part of some layers, under the hooks that are set."""
    blocks, (attn, norm, mlp, post_attn, post_mlp) = blocks_of(model, family)
    seen = {}

    def keep(layer, x):
        seen[layer] = x.detach().reshape(*batch.ids.shape, -1).clone()

    def before(module, layer):
        return module.register_forward_pre_hook(
            lambda m, args, kwargs: keep(layer, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )

    def behind(module, layer):
        return module.register_forward_hook(lambda m, args, out: keep(layer, first(out)))

    handles = []
    for layer in layers:
        block = blocks[layer]
        inner = "fc2" if mlp == "fc1 and fc2" else mlp
        if part == "resid_pre":
            handles.append(before(block, layer))
        elif part == "resid_post":
            handles.append(behind(block, layer))
        elif part == "post_attn_resid":
            handles.append(before(getattr(block, norm or mlp), layer))
        elif part == "post_attn_ln":
            reader = getattr(block, norm or mlp)
            handles.append(behind(reader, layer) if norm else before(reader, layer))
        elif part == "attn_out":
            handles.append(behind(getattr(block, post_attn or attn), layer))
        else:
            handles.append(behind(getattr(block, post_mlp or inner), layer))
    with hooked(*handles):
        model.logits(batch)
    return seen


@contextmanager
def zeroed(model, family, layers):
    """Let the attention of layers give zeros."""

    def zero(module, args, output):
        zeros = torch.zeros_like(first(output))
        return zeros if isinstance(output, torch.Tensor) else (zeros, *output[1:])

    modules = [attention_of(model, family, layer) for layer in layers]
    with hooked(*[module.register_forward_hook(zero) for module in modules]):
        yield


def allowed_pairs(model, family, batch, layer):
    """Return which token may attend to which, worked out from the family's configuration."""
    length = batch.ids.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    config = model.config
    allowed = (key <= query).expand(len(batch.ids), -1, -1)
    kinds = getattr(config, "layer_types", None) or []
    if kinds and kinds[layer] == "sliding_attention":
        allowed = allowed & (key > query - config.sliding_window)
    image = batch.image
    if family == "gemma3":  # an image's tokens see each other
        allowed = allowed | (image[:, :, None] & image[:, None, :])
    if family == "paligemma":  # image and prompt see each other
        given = batch.mask & ~batch.response
        allowed = allowed | (given[:, :, None] & given[:, None, :])
    return allowed & batch.mask[:, None, :]


@contextmanager
def masked(model, family, batch, layers, hide):
    """Give every layer a mask made here; in `hide` other tokens do not see those of the image."""
    hidden = ~batch.image[:, :, None] & batch.image[:, None, :] & batch.mask[:, :, None]
    with ExitStack() as stack:
        for layer in layers:
            module = attention_of(model, family, layer)
            allowed = allowed_pairs(model, family, batch, layer)
            if layer in hide:
                allowed = allowed & ~hidden
            mask = allowed[:, None]
            if model.config._attn_implementation == "eager":
                smallest = torch.finfo(model.dtype).min
                mask = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, smallest)
            handle = module.register_forward_pre_hook(
                lambda m, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}),
                with_kwargs=True,
            )
            stack.enter_context(hooked(handle))
        yield


def by_two_passes(model, family, batch, part, layers, method, scope):
    """Return δ of each layer at a part."""
    deepest = max(layers)

    def turned_off(off):
        if method == "knockout":
            return masked(model, family, batch, range(deepest + 1), off)
        return zeroed(model, family, off)

    with turned_off([]):
        on = states(model, family, batch, part, layers)
    if scope == "joint":
        crossing = [i for i in layers if hasattr(blocks_of(model, family)[0][i], "cross_attn")]
        everywhere = {"knockout": range(deepest + 1), "cross_attention": crossing}
        with turned_off(everywhere.get(method, layers)):
            off = states(model, family, batch, part, layers)
        return {layer: on[layer].float() - off[layer].float() for layer in layers}
    found = {}
    for layer in layers:
        with turned_off([layer]):
            off = states(model, family, batch, part, [layer])
        found[layer] = on[layer].float() - off[layer].float()
    return found
