"""Datasets of the Hugging Face hub, by their id, streamed so that only what is read is fetched.

`data.subset` names a folder of the dataset, or a file, whose rows are then the split `train`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from saefty.data.base import DATASETS, DataSection, Record
from saefty.errors import ConfigError, ExternalError

SCRIPTS = "Dataset scripts are no longer supported"


@DATASETS.register("hub")
def hub(section: DataSection) -> Iterator[Record]:
    """Yield the rows of the dataset `data.path` (an id such as `user/name`), split `data.split`."""
    if section.path is None:
        raise ConfigError("data.path: required with data.name=hub, but not given")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    where = {}
    if section.subset is not None:
        where = {"data_files" if Path(section.subset).suffix else "data_dir": section.subset}
    try:
        rows = datasets.load_dataset(
            section.path, split=section.split, revision=section.revision, streaming=True, **where
        )
        for row in _undecoded(rows):
            yield dict(row)
    except (HfHubHTTPError, ConnectionError, FileNotFoundError, ValueError, RuntimeError) as error:
        is_script = SCRIPTS in str(error)
        if isinstance(error, RuntimeError) and not is_script:
            raise
        raise ExternalError(
            f"the dataset {section.path} (split {section.split}) could not be read from the hub: "
            f"{error}",
            then="Set data.revision=refs/convert/parquet, where the hub keeps a copy as Parquet."
            if is_script
            else "Check data.path and data.split, the network, and HF_TOKEN for a gated dataset.",
        ) from error


def _undecoded(rows: Iterable[Record]) -> Iterable[Record]:
    """Leave images as the bytes they are, so that one that is damaged stops nothing."""
    import datasets

    features = getattr(rows, "features", None) or {}
    inner = [getattr(feature, "feature", feature) for feature in features.values()]
    if any(isinstance(feature, datasets.Image) for feature in inner):
        undecoded: Iterable[Record] = rows.decode(False)  # type: ignore[attr-defined]
        return undecoded
    return rows
