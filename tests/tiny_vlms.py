"""Tiny random vision-language models of every tested family, saved as folders with processors.

Text models have 3 blocks, 32 wide; vision towers 2, so that the two lists differ in length. The
tokenizer is the byte-level BPE of `tiny_models` with the family's own image tokens; templates write
an image as the family's do. Images are a few patches large. Weights are large enough for the text
to depend on the image: Gemma 3's projector and Mllama's gates, zero when made, are filled.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

import tiny_models
from saefty.models.base import ModelAdapter, load_model
from saefty.models.processors import without_video

_FOLDER = tempfile.TemporaryDirectory(prefix="tiny-vlms-")
N_LAYERS, D_MODEL, MAX_LENGTH = 3, 32, 256
PATCH, SIDE = 4, 16
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT_OF = {
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "gemma3": "gemma3_text",
    "paligemma": "gemma",
    "idefics3": "llama",
    "smolvlm": "llama",
    "mllama": "llama",
}
FAMILIES = tuple(TEXT_OF)
QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
IDEFICS = (
    "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)),
)  # fmt: skip
IMAGE_TOKENS = {
    **dict.fromkeys(("llava", "llava_next", "paligemma"), ("<image>",)),
    "llava_onevision": ("<image>", "<video>"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QWEN),
    "gemma3": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS),
    "mllama": ("<|image|>", "<|python_tag|>"),
}
WRITTEN = {
    **dict.fromkeys(("llava", "llava_next"), "<image>\n"),
    **dict.fromkeys(("llava_onevision", "idefics3", "smolvlm", "paligemma"), "<image>"),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "".join(QWEN[:3])),
    "gemma3": "<start_of_image>",
    "mllama": "<|image|>",
}
"""What the template writes for an image."""
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)


def example_images() -> list[str]:
    """Return the paths of four small PNG pictures that differ in colours, shapes and size."""
    return list(_images())


@cache
def _images() -> tuple[str, ...]:
    folder = Path(_FOLDER.name) / "images"
    folder.mkdir()
    shapes = [
        ("red", "yellow", (24, 24)),
        ("blue", "white", (24, 24)),
        ("green", "black", (40, 20)),
        ("white", "red", (18, 44)),
    ]
    paths = []
    for i, (ground, shape, size) in enumerate(shapes):
        image = Image.new("RGB", size, ground)
        draw = ImageDraw.Draw(image)
        draw.ellipse((i, 2, size[0] // 2 + i, size[1] - 3), fill=shape)
        paths.append(str(folder / f"{ground}.png"))
        image.save(paths[-1])
    return tuple(paths)


def tokenizer_of(family: str) -> transformers.PreTrainedTokenizerFast:
    """Return the family's tokenizer, with image tokens among the special ones."""
    tokenizer = tiny_models.tokenizer_of(TEXT_OF[family])
    names = ("boi_token", "eoi_token", "image_token") if family == "gemma3" else ()
    template = tokenizer.chat_template
    if names:
        named = dict(zip(names, IMAGE_TOKENS[family], strict=True))
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            extra_special_tokens=named,
        )
    else:
        tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS[family])})
    tokenizer.chat_template = None if family == "paligemma" else with_images(template, family)
    return tokenizer


def with_images(template: str, family: str) -> str:
    """Return a chat template of `tiny_models` that takes contents as lists of images and texts."""
    for written in ("{{ m['content'] | trim }}", "{{ m['content'] }}"):
        template = template.replace(
            written, PARTS.replace("IMAGE", f"{{{{ {WRITTEN[family]!r} }}}}")
        )
    return template


def _text(family: str, tokenizer: Any, **changes: Any) -> Any:
    changes = {"max_position_embeddings": MAX_LENGTH, **changes}
    return tiny_models.config_of(TEXT_OF[family], len(tokenizer), **changes)


def _llava(family: str, tokenizer: Any) -> tuple[Any, Any]:
    next_one = family == "llava_next"
    grid = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
    config = (transformers.LlavaNextConfig if next_one else transformers.LlavaConfig)(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=_text(family, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **(grid if next_one else {}),
    )
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    images = (
        transformers.LlavaNextImageProcessorPil(**size, **grid)
        if next_one
        else transformers.CLIPImageProcessorPil(**size)
    )
    kind = transformers.LlavaNextProcessor if next_one else transformers.LlavaProcessor
    strategy = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, kind(images, tokenizer, patch_size=PATCH, **strategy)


def _onevision(family: str, tokenizer: Any) -> tuple[Any, Any]:
    grid = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=_text(family, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        **grid,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, **grid
    )
    processor = without_video(transformers.LlavaOnevisionProcessor)(
        images,
        tokenizer,
        None,
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )
    return config, processor


def _qwen(family: str, tokenizer: Any) -> tuple[Any, Any]:
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[family]
    shared = {"depth": 2, "num_heads": 2, "patch_size": PATCH}
    vision = {
        "qwen2_vl": {"embed_dim": 16, "hidden_size": D_MODEL},
        "qwen2_5_vl": {
            "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": D_MODEL,
            "window_size": 4 * PATCH, "fullatt_block_indexes": [1],
        },
        "qwen3_vl": {
            "hidden_size": 16, "intermediate_size": 32, "out_hidden_size": D_MODEL,
            "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },
    }[family]  # fmt: skip
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": D_MODEL,
        "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
        },
        **({"head_dim": 8} if family == "qwen3_vl" else {}),
    }  # fmt: skip
    start, image, end, video = map(tokenizer.convert_tokens_to_ids, QWEN)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config={**shared, **vision},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=PATCH, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    )
    return config, without_video(getattr(transformers, f"{kind}Processor"))(images, tokenizer, None)


def _gemma3(family: str, tokenizer: Any) -> tuple[Any, Any]:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=_text(family, tokenizer),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    images = transformers.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)


def _paligemma(family: str, tokenizer: Any) -> tuple[Any, Any]:
    images = transformers.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=_text(family, tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=D_MODEL,
        hidden_size=D_MODEL,
    )
    return config, processor


def _idefics(family: str, tokenizer: Any) -> tuple[Any, Any]:
    kind = "Idefics3" if family == "idefics3" else "SmolVLM"
    config = getattr(transformers, f"{kind}Config")(
        vision_config=VISION,
        text_config=_text(family, tokenizer, pad_token_id=tokenizer.pad_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = getattr(transformers, f"{kind}ImageProcessorPil")(
        size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    processor = without_video(getattr(transformers, f"{kind}Processor"))
    rest = (None,) if family == "smolvlm" else ()
    return config, processor(images, tokenizer, *rest, image_seq_len=4)


def _mllama(family: str, tokenizer: Any) -> tuple[Any, Any]:
    tiles = 4
    pairs = [(w, h) for w in range(1, tiles + 1) for h in range(1, tiles + 1) if w * h <= tiles]
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": SIDE, "patch_size": PATCH, "max_num_tiles": tiles,
        "vision_output_dim": 32, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [list(pair) for pair in pairs],
    }  # fmt: skip
    text = {
        "vocab_size": len(tokenizer), "hidden_size": D_MODEL, "intermediate_size": 64,
        "num_hidden_layers": N_LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH, "cross_attention_layers": [1],
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    config = transformers.MllamaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    images = transformers.MllamaImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, max_image_tiles=tiles
    )
    return config, transformers.MllamaProcessor(images, tokenizer)


MAKERS = {
    **dict.fromkeys(("llava", "llava_next"), _llava),
    "llava_onevision": _onevision,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _qwen),
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    "mllama": _mllama,
}


def build(family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a random model of the family and its processor into `folder`, and return it."""
    config, processor = MAKERS[family](family, tokenizer_of(family))
    processor.chat_template = processor.tokenizer.chat_template
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "ln_" in name:
                weight.add_(0.1 * torch.randn_like(weight))  # norms that do something
            elif weight.ndim >= 2:
                weight.copy_(0.15 * torch.randn_like(weight))  # replies that depend on the prompt
            elif weight.numel() == 1:
                weight.fill_(0.8)  # gates that let something through
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@cache
def folder_of(family: str, dtype: torch.dtype = torch.float32) -> Path:
    """Return a folder with the family's model, made once for all tests."""
    folder = Path(_FOLDER.name) / f"{family}-{str(dtype).removeprefix('torch.')}"
    return build(family, folder, dtype=dtype)


@cache
def load(family: str, dtype: torch.dtype = torch.float32) -> ModelAdapter:
    """Return the family's model, loaded once for all tests. It holds no state between calls."""
    return load_model(str(folder_of(family, dtype)))
