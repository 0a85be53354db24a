"""What can go wrong between an image, a text and a checkpoint, and what becomes of it."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import tiny_models
import tiny_vlms
from saefty.errors import InputError, MismatchError
from saefty.images import BadImageError, keep_image, load_image
from saefty.models import processors
from saefty.models.base import load_model
from saefty.models.image_text import ImageChatRenderer
from saefty.models.mllama import Mllama
from saefty.records import ROLES, Example, Message, Site

PARTS_ONLY = (  # LLaVA-OneVision's: contents are lists, and a text alone writes nothing
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}"
    "{% endfor %}{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + p['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SYSTEM_IS_TEXT = (  # Llama 3.2 Vision's: the system's content is written as it stands
    "{% for m in messages %}[{{ m['role'] }}] "
    "{% if m['role'] == 'system' or m['content'] is string %}{{ m['content'] | trim }}"
    "{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}{{ '<image>' }}{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


# transformers makes labels for PaliGemma in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def pictures():
    return tiny_vlms.example_images()


def roles_of(item, role):
    return np.flatnonzero(item.roles == ROLES.index(role))


def copied(family, folder):
    return Path(shutil.copytree(tiny_vlms.folder_of(family), folder / family))


def test_bad_images_and_markers_that_do_not_fit_are_told_example_by_example(pictures, tmp_path):
    model = tiny_vlms.load("llava")
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(pictures[0]).read_bytes()[:60])
    wrong = {
        "is cut off": Example("torn", "What?", image=str(torn)),
        "there is no such file": Example("gone", "What?", image=str(tmp_path / "gone.png")),
        "2 image markers (<image>) for one image": Example(
            "two", "<image> or <image>", image=pictures[0]
        ),
        "1 image markers (<image>), the example no image": Example("bare", "see <image>"),
    }
    *items, good = model.tokenize([*wrong.values(), Example("good", "What?", image=pictures[0])])
    for item, reason in zip(items, wrong, strict=True):
        assert item.status == "bad_image"
        assert reason in item.reason
        with pytest.raises(ValueError, match="is bad_image"):
            model.collate([item])
    assert good.status == "ok"
    with pytest.raises(InputError, match=r"torn cannot be replied to: .*is cut off") as error:
        model.generate([wrong["is cut off"]], max_new_tokens=2)
    assert "an image that can be read" in str(error.value)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_an_image_that_the_processor_refuses_is_a_bad_image_with_its_reason(family, tmp_path):
    strip = tmp_path / "strip.png"
    PIL.Image.new("RGB", (300, 1)).save(strip)
    [item] = tiny_vlms.load(family).tokenize([Example("strip", "What?", image=str(strip))])
    assert item.status == "bad_image"
    assert "strip.png: the model's processor refuses it (absolute aspect ratio" in item.reason


def test_an_image_that_vanishes_after_tokenising_is_named(pictures, tmp_path):
    model, picture = tiny_vlms.load("llava"), tmp_path / "picture.png"
    shutil.copy(pictures[0], picture)
    [item] = model.tokenize([Example("a", "What?", image=str(picture))])
    picture.unlink()
    with pytest.raises(BadImageError, match=r"picture\.png"):
        model.collate([item])


def test_a_token_of_an_image_that_is_spelled_in_the_text_is_a_bad_image(pictures):
    model = tiny_vlms.load("gemma3")  # its marker is another token than its image's
    for image in (None, pictures[0]):
        [item] = model.tokenize([Example("a", "see <image_soft_token>", image=image)])
        assert (item.status, item.reason) == ("bad_image", "its text spells an image's token")


@pytest.mark.parametrize("family", ["llava", "idefics3", "mllama"])
def test_truncation_never_cuts_an_image(family, pictures):
    model, long = tiny_vlms.load(family), "dog " * 300
    asked = Example("asked", long, image=pictures[0])
    answered = Example("answered", "What?", long, image=pictures[0])
    text = Example("text", long)
    whole = model.tokenize([asked])[0]
    assert (whole.status, whole.reason) == ("too_long", None)
    for example in (asked, answered):
        left, right = (model.tokenize([example], truncate=side)[0] for side in ("left", "right"))
        assert (left.status, left.truncated) == ("too_long", False)
        assert f"{len(left.ids)} tokens, at most 256; cutting" in left.reason
        assert (right.status, right.truncated, len(right.ids)) == ("ok", True, 256)
        assert len(roles_of(right, "image")) == len(roles_of(whole, "image"))
        model.logits(model.collate([right]))
    assert model.tokenize([text], truncate="left")[0].status == "ok"


def test_pictures_in_memory_are_read_as_files_are(pictures, tmp_path):
    model = tiny_vlms.load("llava")
    kept = [
        keep_image(Path(pictures[0]).read_bytes(), tmp_path),
        keep_image(PIL.Image.open(pictures[0]), tmp_path),
    ]
    examples = [Example("a", "What?", image=image) for image in (pictures[0], *kept)]
    logits = model.logits(model.collate(model.tokenize(examples)))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_tokenised_examples_hold_no_pixels(pictures):
    model = tiny_vlms.load("llava_next")
    model.tokenize([Example("warm", "What?", image=picture) for picture in pictures])

    def held():
        gc.collect()
        kinds = (PIL.Image.Image, torch.Tensor)
        return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())

    before = held()
    items = model.tokenize([Example(str(i), "What?", image=pictures[i % 4]) for i in range(40)])
    assert (held(), len(items)) == (before, 40)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            PARTS_ONLY,
            "<|im_start|>system \nBe kind<|im_end|><|im_start|>user <image>\nHi<|im_end|>"
            "<|im_start|>assistant \nYes<|im_end|><|im_start|>user \nMore<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            SYSTEM_IS_TEXT,
            "[system] Be kind<|eot|>[user] <image>Hi<|eot|>[assistant] Yes<|eot|>"
            "[user] More<|eot|>[assistant] ",
        ),
        (
            tiny_models.LLAMA_TEMPLATE,
            "<|begin|><|head|>system<|/head|>\n\nBe kind<|eot|><|head|>user<|/head|>\n\n<image>\n"
            "Hi<|eot|><|head|>assistant<|/head|>\n\nYes<|eot|><|head|>user<|/head|>\n\nMore<|eot|>"
            "<|head|>assistant<|/head|>\n\n",
        ),
    ],
    ids=["lists", "lists but for the system", "texts"],
)
def test_templates_of_lists_and_of_texts_get_one_marker_in_the_first_user_turn(
    template, text, pictures
):
    tokenizer = tiny_vlms.tokenizer_of("llava")
    tokenizer.chat_template = template
    render = ImageChatRenderer(tokenizer, "a model", tiny_vlms.load("llava").images)
    turns = (("system", "Be kind"), ("user", "Hi"), ("assistant", "Yes"), ("user", "More"))
    messages = tuple(Message(*turn) for turn in turns)
    found = render(Example("a", "", messages=messages, image=pictures[0]))
    assert found.text == text
    contents = [(found.text[start:end], role) for start, end, role in found.parts]
    assert contents == [(words, role) for role, words in turns]


def test_paligemma_reads_its_prompt_both_ways_and_its_response_forwards(pictures):
    model = tiny_vlms.load("paligemma")
    image, prompt, reply = load_image(pictures[0]), "What is shown?", "a red box"
    truth = model.processor(
        text=f"<image>{prompt}", images=[[image]], suffix=reply, return_tensors="pt"
    )
    truth.pop("labels")
    [item] = model.tokenize([Example("a", prompt, reply, image=pictures[0])])
    assert item.ids.tolist() == truth["input_ids"][0, :-1].tolist()  # the suffix has an EOS
    assert item.response_start == int(truth["token_type_ids"][0].argmax())
    with torch.no_grad():
        expected = model.model(**truth).logits[:, :-1]
    torch.testing.assert_close(model.logits(model.collate([item])), expected, atol=2e-6, rtol=1e-5)
    assert not model.causal


def test_mllama_reads_and_edits_the_residual_of_blocks_that_attend_to_the_image(pictures):
    model = tiny_vlms.load("mllama")
    assert type(model) is Mllama
    parts = ("resid_pre", "post_attn_resid", "post_attn_ln", "resid_post")
    sites = [Site(1, part) for part in parts]
    examples = [Example("image", "What?", image=pictures[0]), Example("text", "Hello robot")]
    batch = model.collate(model.tokenize(examples))
    found = model.capture(batch, sites)
    before, between, _, after = (found[site] for site in sites)
    block, seen = model.blocks[1], {}
    handle = block.cross_attn.register_forward_hook(lambda m, a, out: seen.update(out=out[0]))
    model.logits(batch)
    handle.remove()
    gated = block.cross_attn_attn_gate.tanh() * seen["out"]
    torch.testing.assert_close(between[0], before[0] + gated[0])
    assert (after[0] - before[0]).norm() > 0.1 * before[0].norm()
    # A text goes past the block, beside an image and by itself.
    assert torch.equal(after[1], before[1])
    alone = model.collate(model.tokenize(examples[1:]))
    itself = model.capture(alone, [Site(1), Site(2)])
    assert torch.equal(itself[Site(1)], model.capture(alone, sites[:1])[sites[0]])
    with model.intervene(Site(1), lambda x, positions: x + 1):
        assert not torch.equal(model.capture(alone, [Site(2)])[Site(2)], itself[Site(2)])
    for part in ("attn_out", "mlp_out"):
        with pytest.raises(MismatchError, match=f"hook_{part} cannot be read in .*by a gate"):
            model.capture(batch, [Site(1, part)])
        model.capture(batch, [Site(0, part)])


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm", "llava_onevision"])
def test_a_folder_with_the_files_of_older_versions_is_read_alike(family, pictures, tmp_path):
    folder = copied(family, tmp_path)
    described = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    images = described.pop("image_processor")
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    images["processor_class"] = described["processor_class"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if family != "qwen2_vl":  # whose processor has nothing of its own to say
        (folder / "processor_config.json").write_text(json.dumps(described))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    example = Example("a", "What?", image=pictures[2])
    logits = []
    for model in (tiny_vlms.load(family), load_model(str(folder))):
        logits.append(model.logits(model.collate(model.tokenize([example]))))
    assert torch.equal(*logits)
    assert {"preprocessor_config.json", "chat_template.json"} <= model.provenance["files"].keys()
    assert model.provenance["image_processor"].endswith("Pil")


def test_a_folder_that_does_not_say_how_images_are_prepared_is_refused(tmp_path):
    folder = copied("llava", tmp_path)
    (folder / "processor_config.json").unlink()
    with pytest.raises(InputError, match=r"neither processor_config\.json nor preprocessor_con"):
        load_model(str(folder))


def test_where_torchvision_is_the_processors_are_left_as_they_are(monkeypatch):
    kind = type(tiny_vlms.load("qwen2_vl").processor)
    whole = kind.__mro__[1]
    assert processors.without_video(whole) is not whole
    assert processors.without_video(whole).__name__ == whole.__name__ == kind.__name__
    monkeypatch.setattr(processors, "is_torchvision_available", lambda: True)
    assert processors.without_video(whole) is whole


def test_no_reply_holds_an_images_token(pictures):
    model = tiny_vlms.load("llava")
    towards = model.model.lm_head.weight[model.images.token_id]

    def wish(x, positions):
        return x + 50 * towards

    example = Example("a", "What?", image=pictures[0])
    batch = model.collate(model.tokenize([example]))
    with model.intervene(Site(2), wish):
        assert model.logits(batch)[0, -1].argmax() == model.images.token_id
        cached = model.generate([example], max_new_tokens=3)
        assert cached == model.generate([example], max_new_tokens=3, cache=False) != [""]
