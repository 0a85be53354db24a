"""A tree of JSONL: a file a sentence, a line a token.

    layer_NN/sentence_NNNN.jsonl   {"token_pos", "token_str", "nnz", "feat_ids", "feat_vals"}

All latents that fired, by falling value. Sentences are numbered as in the example table; one that
was left out has no file. BOS is left out by its id and still counted in `token_pos`. A token that
is part of a character shows its bytes (`<E6 9D>`). As many files as sentences: for large data take
the store itself, or Parquet.
"""

from collections.abc import Mapping
from pathlib import Path

from saefty import fsio
from saefty.stores.features import FeatureStore, Key, layer_of
from saefty.stores.sentences import check_tokens, sentences_of


def layer_folder(key: Key) -> str:
    """Return what an export calls an SAE: `layer_NN`, and `layer_NN__<name>` for a further one."""
    _, mark, name = str(key).partition("__")
    return f"layer_{layer_of(key):02d}{mark}{name}"


def write_sentence_jsonl(
    store: FeatureStore,
    key: Key,
    folder: Path,
    *,
    parts: Mapping[int, bytes] | None = None,
    bos_id: int | None = None,
) -> list[Path]:
    """Write an SAE's features as one file a sentence; return their paths.

    Args:
        store: The store.
        key: Which SAE.
        folder: The folder that gets `layer_NN`; files of these names are replaced.
        parts: The bytes of tokens by id, for tokens that are parts of a character.
        bos_id: The token to leave out; None takes what the store says, if it says it.

    Raises:
        MismatchError: If the store has no such SAE, or its rows are no tokens.
        DiskError: If a file cannot be written.
    """
    check_tokens(store, "a file a sentence")
    bos = store.manifest.get("bos_token_id") if bos_id is None else bos_id
    written = []
    for sentence in sentences_of(store, key):
        path = folder / layer_folder(key) / f"sentence_{sentence.example:04d}.jsonl"
        lines = []
        for i, token in enumerate(sentence.spelling(parts)):
            if sentence.rows["token_id"][i] == bos:
                continue
            ids, values = sentence.codes[i]
            record = {
                "token_pos": int(sentence.rows["token_pos"][i]),
                "token_str": token,
                "nnz": len(ids),
                "feat_ids": ids.tolist(),
                # The shortest digits that are this float32, not those of its double.
                "feat_vals": [float(one) for one in values.astype(str)],
            }
            lines.append(fsio.dump_json_line(record))
        fsio.commit_text(path, "".join(lines))
        written.append(path)
    return written
