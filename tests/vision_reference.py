"""δ of a vision-language model and its poolings, worked out the plain way.

Transformers with hooks set by hand, one example at a time without padding, two whole forward passes
for each δ. Nothing of the package is imported, so that what is checked against this shares no
mistake with it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from PIL import Image

PARTS = ("post_attn_resid", "post_attn_ln", "post_mlp")
CONTRASTS = [
    (method, scope) for method in ("zero_attention", "knockout") for scope in ("per_layer", "joint")
]


@dataclass(frozen=True)
class Seen:
    """One example as the model takes it: what goes in, and which tokens are what."""

    inputs: dict
    image: np.ndarray
    special: np.ndarray


class PlainModel:
    """A model of transformers, Llama-like inside, with eager attention in float32."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.blocks = self.model.model.language_model.layers
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.images = transformers.AutoImageProcessor.from_pretrained(folder)
        self.token = self.model.config.image_token_id
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = sorted(i for i, token in added if token.special)

    def see(self, prompt, path):
        """Return a prompt with an image before it, as a chat that waits for its answer."""
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        with Image.open(path) as image:
            pixels = dict(self.images(images=[image.convert("RGB")], return_tensors="pt"))
        marker = self.tokenizer.convert_ids_to_tokens(self.token)
        assert text.count(marker) == 1
        text = text.replace(marker, marker * self._tokens_of(pixels))
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        of_image = ids == self.token
        if "image_grid_thw" in pixels:
            pixels["mm_token_type_ids"] = of_image.long()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        return Seen(inputs, of_image[0].numpy(), np.isin(ids[0].numpy(), self.special))

    def _tokens_of(self, pixels):
        """Return how many tokens an image takes: its patches, four of which Qwen makes one."""
        if "image_grid_thw" in pixels:
            return int(pixels["image_grid_thw"].prod()) // self.images.merge_size**2
        height, width = pixels["pixel_values"].shape[-2:]
        patch = self.model.config.vision_config.patch_size
        return (height // patch) * (width // patch)

    def states(self, seen, method=None, off=()):
        """Return what a whole pass computes in every block, by (part, layer), with some layers off.

        Args:
            seen: The example.
            method: `zero_attention` or `knockout`.
            off: The layers whose attention gives zeros, or does not see the image.
        """
        found, hooks = {}, []

        def keep(part, layer, x):
            found[part, layer] = x[0].detach().double().numpy()

        def zero(module, args, output):
            return (torch.zeros_like(output[0]), *output[1:])

        def blind(module, args, given):
            return args, {**given, "attention_mask": self._blind_mask(seen.image)}

        for layer, block in enumerate(self.blocks):
            norm = block.post_attention_layernorm
            hooks += [
                norm.register_forward_pre_hook(
                    lambda m, args, layer=layer: keep(PARTS[0], layer, args[0])
                ),
                norm.register_forward_hook(
                    lambda m, args, out, layer=layer: keep(PARTS[1], layer, out)
                ),
                block.register_forward_hook(
                    lambda m, args, out, layer=layer: keep(
                        PARTS[2], layer, out if isinstance(out, torch.Tensor) else out[0]
                    )
                ),
            ]
            if layer in off and method == "zero_attention":
                hooks.append(block.self_attn.register_forward_hook(zero))
            if layer in off and method == "knockout":
                hooks.append(block.self_attn.register_forward_pre_hook(blind, with_kwargs=True))
        with torch.no_grad():
            self.model(**seen.inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def _blind_mask(self, image):
        """Return what is added to attention: a token sees itself and those before it, no image.

        The image's own tokens see it still.
        """
        query, key = np.ogrid[: len(image), : len(image)]
        hidden = (key > query) | (image[None] & ~image[:, None])
        mask = torch.zeros(1, 1, *hidden.shape)
        return mask.masked_fill(torch.from_numpy(hidden), torch.finfo(torch.float32).min)

    def deltas(self, seen, layers):
        """Return h_on - h_off of some layers by (method, scope), then by (part, layer)."""
        passes, found = {}, {}
        on = self.states(seen)
        for method, scope in CONTRASTS:
            below = range(max(layers) + 1) if method == "knockout" else layers
            found[method, scope] = {}
            for layer in layers:
                off = (layer,) if scope == "per_layer" else tuple(below)
                if (method, off) not in passes:
                    passes[method, off] = self.states(seen, method, off)
                for part in PARTS:
                    delta = on[part, layer] - passes[method, off][part, layer]
                    found[method, scope][part, layer] = delta
        return found


def tokens_of(seen, pooling, span=None, last_k=5):
    """Return the places of the tokens that a pooling takes of an example."""
    text = [i for i in range(len(seen.image)) if not seen.special[i] and not seen.image[i]]
    last_of_image = max(i for i in range(len(seen.image)) if seen.image[i])
    return {
        "none": text,
        "text_only_mean": [i for i in text if i > last_of_image],
        "eos": [len(seen.image) - 1],
        "last_k_mean": text[-last_k:],
        "span_mean": list(range(*(span or (0, 0)))),
    }[pooling]


def pooled(delta, seen, pooling, span=None):
    """Return an example's rows: one of each token for `none`, else their mean."""
    rows = delta[tokens_of(seen, pooling, span)]
    return rows if pooling == "none" else rows.mean(axis=0, keepdims=True)
