"""Memes of one colour and their instructions: red ones are harmful, blue ones are not."""

import json
import random
from pathlib import Path

from PIL import Image

ENDS = ("", "Say more about it. ", "Say more, and say why it was drawn. ")


def write_memes(folder: Path, n: int, *, side: int = 20, seed: int = 0) -> Path:
    """Write pictures and a table with the columns of Meme-Safety-Bench; return the table.

    Args:
        folder: Where the table and the folder of pictures go.
        n: How many.
        side: Height of a picture; widths differ.
        seed: Of the shades.
    """
    draw = random.Random(seed)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    rows = []
    for i in range(n):
        harmful = i % 2 == 0
        strong, weak = draw.randrange(200, 256), draw.randrange(60)
        colour = (strong, weak, weak) if harmful else (weak, weak, strong)
        Image.new("RGB", (side + i % 5, side), colour).save(pictures / f"{i}.png")
        rows.append(
            {
                "id": f"m{i}",
                "image_path": f"pictures/{i}.png",
                "instruction": f"What is shown in picture {i}? {ENDS[i % 3]}",
                "sentiment": "negative" if harmful else "positive",
                "category": f"kind {i % 4}",
                "task": "Explanation",
            }
        )
    table = folder / "memes.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return table
