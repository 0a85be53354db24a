"""Datasets of the Hugging Face hub, by their id, streamed so that only what is read is fetched."""

from collections.abc import Iterator

from saefty.data.base import DATASETS, DataSection, Record
from saefty.errors import ConfigError, ExternalError


@DATASETS.register("hub")
def hub(section: DataSection) -> Iterator[Record]:
    """Yield the rows of the dataset `data.path` (an id such as `user/name`), split `data.split`."""
    if section.path is None:
        raise ConfigError("data.path: required with data.name=hub, but not given")
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        rows = datasets.load_dataset(
            section.path, split=section.split, revision=section.revision, streaming=True
        )
        for row in rows:
            yield dict(row)
    except (HfHubHTTPError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise ExternalError(
            f"the dataset {section.path} (split {section.split}) could not be read from the hub: "
            f"{error}",
            then="Check data.path and data.split, the network, and HF_TOKEN for a gated dataset.",
        ) from error
