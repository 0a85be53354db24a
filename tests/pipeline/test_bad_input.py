"""Mistakes a user makes: each gets a message with both values and the next step, and an exit code.

Every case is a command that would run but for the one thing that is wrong.
"""

import json
import shutil

import pytest
import torch

import tiny_models
from saefty.records import Site
from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae

LAYERS = "extract.layers=[0,2]"


def model_without(world, folder, *patterns):
    """A copy of the model that lacks some files."""
    shutil.copytree(world.model, folder)
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


def refused(world, code, *phrases, words):
    result = world.saefty(*words)
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    assert result.err.startswith("Error: ")
    for phrase in phrases:
        assert phrase in result.err
    return result


@pytest.fixture
def extract(world, tmp_path):
    """Run `extract` with the good words replaced by the bad ones, and check what it says."""

    def run(code, *phrases, **bad):
        words = dict(word.split("=", 1) for word in [*world.data, LAYERS])
        words |= {key.replace("__", "."): str(value) for key, value in bad.items()}
        words.setdefault("run.dir", str(tmp_path / "run"))
        command = ["extract", *(f"{key}={value}" for key, value in words.items() if value)]
        result = refused(world, code, *phrases, words=command)
        assert not (tmp_path / "run").exists()  # nothing is left that binds the next command
        return result

    return run


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestSettings:
    def test_nothing_given(self, world):
        refused(world, 2, "model.name: required", "extract.layers: required", words=["extract"])

    @pytest.mark.parametrize(
        ("word", "phrase"),
        [
            ("extract.layer=[0]", "extract.layer: no such key. Did you mean "
             "'extract.layers'?"),
            ("model.nam=x", "Did you mean 'model.name'?"),
            ("extract.pooling.name=text_mean", "should be none, text_only_mean, eos, last_k_mean "
             "or span_mean, got 'text_mean'. Did you mean 'text_only_mean'?"),
            ("data.name=lokal", "there is no dataset called 'lokal'. Did you mean 'local'?"),
            ("extract.layers=[-1]", "counted from 0, not [-1]"),
            ("extract.layers=[0,0]", "name each block once"),
            ("extract.layers=0,2", "write a list of numbers, such as [0,2], not '0,2'"),
            ("extract.layers=all", "write a list of numbers, such as [0,2], not 'all'"),
            ("extract.limit_examples=0", "should be integer > 0 or null, got 0"),
            ("extract.limit_examples=ten", "got 'ten'"),
            ("data.limit=0", "should be integer > 0 or null, got 0"),
            ("extract.pooling.span=[3,1]", "0 <= start < end, not [3, 1]"),
            ("model.dtype=fp16", "bfloat16 or float16, got 'fp16'. Did you mean 'float16'?"),
            ("model.device=quantum", "model.device is 'quantum', but the devices here are: cpu"),
            ("modelname", "'modelname' is not of the form KEY=VALUE"),
            ("=", "not of the form KEY=VALUE"),
            ("data.path=", "data.path: required with data.name=local"),
        ],
    )  # fmt: skip
    def test_a_word_that_is_wrong(self, world, tmp_path, word, phrase):
        words = [*world.extract(tmp_path / "run")[:-1], word, f"run.dir={tmp_path / 'run'}"]
        refused(world, 2, phrase, words=words)
        assert not (tmp_path / "run").exists()

    def test_a_layer_out_of_range_is_refused_before_the_weights_are_read(
        self, world, extract, tmp_path
    ):
        model = model_without(world, tmp_path / "m", "*.safetensors")
        extract(2, "layer 5 was asked for", "has 3 blocks: layers run 0..2", "extract.layers",
                model__name=model, extract__layers="[0,5]")  # fmt: skip

    def test_a_yaml_file_that_is_not_there(self, world):
        refused(world, 2, "cannot read the configuration no.yaml",
                words=["extract", "-c", "no.yaml"])  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "phrase"), [("a: [1", "is not valid YAML"), ("- a", "must hold keys and values")]
    )
    def test_a_yaml_file_that_cannot_be_used(self, world, file, text, phrase):
        refused(world, 2, phrase, words=["extract", "-c", file("c.yaml", text)])

    def test_a_run_folder_that_is_a_file(self, world, file):
        refused(world, 2, "cannot be used", "Set run.dir",
                words=world.extract(file("file", "")))  # fmt: skip


class TestModels:
    def test_a_folder_that_is_missing(self, extract):
        extract(3, "the model folder ./nowhere does not exist", "Set model.name",
                model__name="./nowhere")  # fmt: skip

    def test_a_name_that_is_neither_a_folder_nor_on_the_hub(self, extract):
        extract(3, "neither a folder here nor readable on the hub", model__name="llamaa")

    def test_a_folder_without_config(self, world, extract, tmp_path):
        model = model_without(world, tmp_path / "m", "config.json")
        extract(3, "has no config.json; it holds", "save_pretrained", model__name=model)

    def test_a_folder_without_tokenizer(self, world, extract, tmp_path):
        model = model_without(world, tmp_path / "m", "tok*")
        extract(3, "has no tokenizer", "tokenizer.save_pretrained", model__name=model)

    def test_a_folder_without_weights(self, world, extract, tmp_path):
        model = model_without(world, tmp_path / "m", "*.safetensors")
        extract(3, "has no weights (*.safetensors)", model__name=model)

    def test_pickled_weights(self, world, extract, tmp_path):
        model = model_without(world, tmp_path / "m", "*.safetensors")
        (model / "pytorch_model.bin").write_bytes(b"\x80\x04")
        extract(8, "are pickled (pytorch_model.bin)", "Convert them once", model__name=model)

    def test_weights_that_were_cut_short(self, world, extract, tmp_path):
        model = model_without(world, tmp_path / "m")
        weights = model / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])
        extract(4, "is damaged", "Copy or download the model again", model__name=model)

    def test_a_model_that_is_not_a_causal_language_model(self, world, extract, tmp_path):
        model = model_without(world, tmp_path / "m")
        config = json.loads((model / "config.json").read_text())
        config |= {"architectures": ["RobertaForSequenceClassification"], "model_type": "roberta"}
        (model / "config.json").write_text(json.dumps(config))
        extract(6, "not a causal language model", "RobertaForSequenceClassification",
                model__name=model)  # fmt: skip


GOOD = '{"text": "hello there", "label": true}\n'
LONG = json.dumps({"text": "word " * 200}) + "\n"


class TestData:
    @pytest.mark.parametrize(
        ("name", "content", "phrases"),
        [
            ("e.jsonl", "", ["holds no examples: 0 rows", "Check data.path"]),
            ("e.json", "", ["holds no examples: 0 rows"]),
            ("l.json", "[]", ["holds no examples: 0 rows"]),
            ("e.csv", "", ["holds no examples: 0 rows"]),
            ("h.csv", "text,label\n", ["holds no examples: 0 rows"]),
            ("e.parquet", "", ["is not a readable Parquet file"]),
            ("a.tsv", "hello", ["its suffix is '.tsv'", ".jsonl, .json, .csv, .parquet, .txt"]),
            ("a.jsonl", '{"body": "x"}\n', ["no column 'text' (data.text), only 'body'"]),
            ("b.jsonl", GOOD + '{"text": "x"\n', ["line 2: not valid JSON", "character 13"]),
            ("c.jsonl", GOOD + "[1]\n", ["line 2: found a list, but an object is wanted"]),
            ("d.jsonl", GOOD.encode() + b'{"text":"caf\xe9"}\n',
             ["line 2: byte 12 is not UTF-8 (0xe9;", "save the file as UTF-8"]),
            ("u.jsonl", GOOD.encode("utf-16-le"), ["line 1: byte 1", "seems to be utf-16-le"]),
            ("s.jsonl", '{"text": "a\\ud800b"}\n', ["row 0", "half of a character"]),
            ("f.jsonl", '{"text": ["a"]}\n', ["(data.text) holds a list, not text"]),
            ("o.json", '{"rows": []}', ["holds an object, but a list of objects is wanted"]),
            ("p.json", "[1]", ["entry 0 (from 0) is a number, not an object"]),
            ("deep.json", "[" * 100_000, ["nests too deep"]),
            ("r.csv", "text,label\nYes, it is.,1\n",
             ["line 2: the row has 3 cells, but the header has 2", "in quotes"]),
            ("r2.csv", "text,label\nhello\n", ["has 1 cells, but the header has 2"]),
            ("q.csv", 'text,label\n"hello,1\n', ["not valid CSV", "a quote that is not closed"]),
            ("t.csv", "text,text\na,b\n", ["names the column 'text' more than once"]),
            ("long.jsonl", LONG * 2, ["none of the 2 examples", "too_long 2", "up to 96 tokens",
             "the longest text has", "extract.truncate=right"]),
            ("empty.jsonl", '{"text": ""}\n', ["(empty 1)", "names a column with text"]),
        ],
    )  # fmt: skip
    def test_a_file_that_cannot_be_used(self, extract, file, name, content, phrases):
        extract(3, *phrases, data__path=file(name, content), data__label="", data__id="")

    def test_a_file_that_is_missing(self, extract):
        extract(3, "there is no file none.jsonl", "Set data.path", data__path="none.jsonl")

    def test_a_column_that_is_misspelt(self, extract):
        extract(3, "no column 'txt' (data.text)", "Did you mean 'text'?", data__text="txt")
        extract(3, "no column 'lable' (data.label)", "Did you mean 'label'?", data__label="lable")

    def test_no_text_column_named_and_none_to_guess(self, extract, file):
        path = file("b.jsonl", '{"body": "x"}\n')
        extract(3, "no column called text, prompt or messages, only 'body'", "Set data.text",
                data__path=path, data__text="", data__label="", data__id="")  # fmt: skip

    def test_two_text_columns(self, extract):
        extract(3, "data.prompt and data.text are both set", data__prompt="text")

    def test_a_label_that_cannot_be_understood_and_the_key_that_helps(self, extract, file):
        path = file("l.jsonl", '{"text": "a", "label": "violence"}\n{"text": "b", "label": "-"}\n')
        said = extract(3, "row 0", "'violence' is neither harmful nor harmless",
                       "labels: violence, -", data__path=path, data__id="")  # fmt: skip
        assert str(path) in said.err

    def test_a_harmful_value_that_no_row_has(self, extract, file):
        path = file("l.jsonl", '{"text": "a", "label": "violence"}\n{"text": "b", "label": "-"}\n')
        extract(3, "is one of data.harmful=['violance']", "its labels are 'violence' (1), '-' (1)",
                "Did you mean 'violence'?", data__path=path, data__id="",
                data__harmful="[violance]")  # fmt: skip

    def test_ids_that_repeat(self, extract, file):
        path = file("i.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n')
        extract(3, "uses 1 ids for more than one row: 1", "leave it out to number the rows",
                data__path=path, data__label="")  # fmt: skip

    def test_a_mean_over_spans_that_nothing_names(self, extract):
        extract(3, "no_span 40", "data.span to a column", extract__pooling__name="span_mean")

    def test_a_span_that_no_text_reaches(self, extract):
        extract(3, "no_tokens 40", "extract.pooling", "(50, 60)",
                extract__pooling__name="span_mean", extract__pooling__span="[50,60]")  # fmt: skip

    def test_encode_names_its_own_keys(self, world, file):
        path = file("long.jsonl", LONG)
        words = [f"data.path={path}", f"model.name={world.model}", f"encode.sae={world.trained}"]
        refused(world, 3, "set encode.truncate=right", words=["encode", *words])

    def test_texts_that_are_too_long_are_counted_and_the_others_read(self, world, file, tmp_path):
        path = file("some.jsonl", GOOD + LONG + GOOD)
        words = [f"model.name={world.model}", f"data.path={path}", LAYERS]
        result = world.saefty("extract", *words, f"run.dir={tmp_path / 'x'}", "--json")
        assert result.code == 0
        assert "in 3 = ok 2 + skipped 1 (too_long 1) + failed 0" in result.err
        assert json.loads(result.out)["figures"]["examples"]["skipped"] == {"too_long": 1}

    def test_the_settings_that_failed_do_not_bind_the_next_command(self, world, file, tmp_path):
        words = ["extract", f"model.name={world.model}", f"data.path={file('l.jsonl', LONG)}",
                 LAYERS, f"run.dir={tmp_path / 'x'}"]  # fmt: skip
        assert world.saefty(*words).code == 3
        assert world.saefty(*words, "extract.truncate=right").code == 0


class TestSaes:
    def encode(self, world, code, *phrases, words=(), sae=None):
        given = [f"encode.sae={sae or world.trained}", *words]
        return refused(world, code, *phrases, words=["encode", *given])

    def test_an_sae_of_another_width(self, world, tmp_path):
        torch.manual_seed(0)
        sae = SaeConfig("topk", 64, 128, 4).build()
        sae.site = Site(0)
        save_sae(sae, tmp_path / "wide")
        self.encode(world, 6, "reads activations 64 wide", "are 32 wide",
                    "Use an SAE that was trained on this model", words=world.data,
                    sae=tmp_path / "wide")  # fmt: skip

    def test_an_sae_folder_that_is_missing(self, world):
        self.encode(world, 2, "there is no folder nowhere", words=world.data, sae="nowhere")

    def test_a_folder_without_an_sae(self, world):
        self.encode(world, 2, "holds no SAE: neither in it nor in layer_* folders",
                    "Name the folder of a training", words=world.data,
                    sae=world.extracted)  # fmt: skip

    def test_an_sae_whose_weights_are_damaged_or_missing(self, world, tmp_path):
        shutil.copytree(world.trained, tmp_path / "s")
        weights = tmp_path / "s" / "layer_0" / "sae_weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-3] ^= 1
        weights.write_bytes(data)
        self.encode(world, 4, "sae_weights.safetensors does not have the bytes that were written",
                    words=world.data, sae=tmp_path / "s")  # fmt: skip
        weights.unlink()
        self.encode(world, 2, "holds no SAE of a known format; it holds cfg.json",
                    words=world.data, sae=tmp_path / "s")  # fmt: skip

    def test_a_layer_without_an_sae(self, world):
        self.encode(world, 6, "layers [1] were asked for, but", "of layers [0, 2]",
                    words=[*world.data, "encode.layers=[1]"])  # fmt: skip

    def test_a_model_and_a_store_or_neither(self, world):
        self.encode(world, 2, "encode.store", "neither is given")
        self.encode(world, 2, "encode.store", "both are given",
                    words=[*world.data, f"encode.store={world.extracted}"])  # fmt: skip

    def test_an_sae_of_another_hook_point_than_the_stores(self, world, tmp_path):
        folder = tmp_path / "mlp"
        assert world.saefty(*world.extract(folder, "extract.hook_point=mlp_out")).code == 0
        self.encode(world, 6, "reads blocks.0.hook_resid_post, but the store holds "
                    "blocks.0.hook_mlp_out", words=[f"encode.store={folder}"])  # fmt: skip

    def test_an_sae_of_another_model_is_used_with_a_warning(self, world, tmp_path):
        other = tiny_models.build("gpt2", tmp_path / "gpt2")
        words = [f"encode.sae={world.trained}", *world.data[1:], f"model.name={other}"]
        result = world.saefty("encode", *words, f"run.dir={tmp_path / 'f'}")
        assert result.code == 0
        assert f"was trained on {world.model} and is used on {other}" in result.err


class TestStores:
    def train(self, world, code, *phrases, words):
        refused(world, code, *phrases, words=["train", "train.max_steps=2", "sae.k=4", *words])

    def test_latest_without_a_run(self, world, tmp_path):
        self.train(world, 2, "there is no complete run below", "Run that stage first",
                   words=[f"run.root={tmp_path}"])  # fmt: skip

    def test_a_store_that_is_missing(self, world):
        self.train(world, 2, "there is no folder nowhere", words=["train.store=nowhere"])

    def test_a_store_that_is_not_complete(self, world, tmp_path):
        shutil.copytree(world.extracted, tmp_path / "x")
        (tmp_path / "x" / "manifest.json").unlink()
        self.train(
            world, 4, "is not complete", "it resumes", words=[f"train.store={tmp_path / 'x'}"]
        )
        (tmp_path / "x" / "finished.json").unlink()
        self.train(
            world, 2, "is not complete", "resume it", words=[f"train.store={tmp_path / 'x'}"]
        )

    def test_a_folder_that_is_no_store(self, world):
        self.train(world, 4, "holds no store", "Name a folder that extract",
                   words=[f"train.store={world.trained}"])  # fmt: skip
        self.train(world, 4, "is a store of features, but one of activations is wanted",
                   words=[f"train.store={world.encoded}"])  # fmt: skip

    @pytest.mark.parametrize(
        ("word", "phrase"),
        [
            ("train.layers=[1]", "names layer 1, but the store holds [0, 2]"),
            ("sae.k=500", "sae.k is 500, but the SAE has only 128 latents"),
            ("sae.arch=topkk", "Did you mean 'topk'?"),
            ("train.batch_size=0", "should be integer > 0, got 0"),
        ],
    )
    def test_an_sae_that_cannot_be_trained_leaves_no_folder(self, world, tmp_path, word, phrase):
        words = [f"train.store={world.extracted}", word, f"run.dir={tmp_path / 's'}"]
        self.train(world, 2, phrase, words=words)
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize(
        ("words", "code", "phrase"),
        [
            (["verify", "nowhere"], 2, "there is no folder nowhere"),
            (["verify", "llama"], 4, "llama holds no store"),
            (["repair", "llama"], 2, "it has no metadata.json that says how it was made"),
            (["repair", "s"], 2, "is a run of train, which has no store to repair"),
            (["repair", "nowhere"], 2, "there is no folder nowhere"),
            (
                ["export", "f", "--out", "o", "--format", "npz"],
                6,
                "is a store of features; npz holds activations",
            ),
            (
                ["export", "x", "--out", "o", "--format", "jsonl"],
                6,
                "is a store of activations; jsonl holds features",
            ),
            (["export", "x", "--out", "o", "--format", "csv"], 2, "neuronpedia, not 'csv'"),
            (["export", "f", "--out", "x"], 2, "x exists and is not empty"),
            (["import", "llama", "--out", "o"], 3, "llama holds no .npz files"),
            (["import", "nowhere", "--out", "o"], 3, "there is no folder nowhere"),
            (["list", "nowhere"], 2, "there is no folder nowhere"),
        ],
    )
    def test_store_commands_on_the_wrong_folder(self, world, words, code, phrase):
        refused(world, code, phrase, words=["store", *words])


def test_an_error_in_json_is_one_object_on_stderr(world):
    result = world.saefty("extract", *world.data, "extract.layers=[7]", "--json")
    record = json.loads(result.err)
    assert result.out == ""
    assert record["error"] == "ConfigError"
    assert record["exit_code"] == result.code == 2
    assert "layer 7" in record["message"]
    assert "extract.layers" in record["then"]


def test_debug_shows_the_traceback(world):
    result = world.saefty("extract", *world.data, "extract.layers=[7]", "--debug")
    assert "Traceback" in result.err
    assert "layer 7 was asked for" in result.err
