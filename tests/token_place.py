"""Two files of sentences, a tiny model, random SAEs, and the config that names them."""

from dataclasses import dataclass
from pathlib import Path

from saefty import sentences
from saefty.config import load_config

K, D_SAE = 12, 96
FIRST = ["The quick brown fox jumps.", "Yes, it is.", "1 + 1 = 2", "東京は日本の首都です。"]
SECOND = ["서울은 대한민국의 수도이다.", "Москва — столица России.", "I bake 🍞 at home 😀"]
SEED_CONFIG = """\
# モデル設定
model_id: "{model}"
sae_path: "{saes}/layer_{{layer}}"
dtype: "float32"  # または "float16"
device: "auto"    # "auto", "mps", "cuda", "cpu"

# レイヤ設定
layers: [0, 1]

# 入力設定
input_csvs:
  - "data/sentences1.csv"
  - "data/sentences2.csv"

# 出力設定
output_dir: "outputs"
"""


@dataclass(frozen=True)
class Place:
    folder: Path
    model: Path
    saes: Path

    def config(self, *words):
        return load_config(sentences.TokensConfig, self.folder / "config.yaml", words)
