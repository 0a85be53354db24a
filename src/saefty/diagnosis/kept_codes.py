"""Codes that were kept, in a dump or a feature store: what they are, and what they look like."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saefty.code_analysis import CodeAnalysis, analyze_codes
from saefty.code_sources import CodeSource, of_dump, of_features
from saefty.diagnosis.code_checks import CodeCheck, check_codes
from saefty.diagnosis.code_samples import HALF, sample_dump, sample_features
from saefty.errors import MismatchError
from saefty.feature_dump import FeatureDump
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ActivationStore
from saefty.stores.base import StoreReader
from saefty.stores.features import FeatureStore

SAMPLE_TOKENS = 8192


@dataclass(frozen=True)
class KeptCodes:
    """Kept codes: what walks them, and the dump or store they are in."""

    source: CodeSource
    held: FeatureDump | FeatureStore

    def check(self, sae: SparseAutoencoder, store: ActivationStore, layer: int) -> CodeCheck:
        """Compare them with what the SAE makes of a store's rows."""
        if isinstance(self.held, FeatureDump):
            kept, swapped = sample_dump(self.held, int(self.source.key), sae.d_sae)
            return check_codes(kept, sae, store, layer, swapped=swapped)
        kept = sample_features(self.held, self.source.key)
        return check_codes(kept, sae, store, layer, same_texts=same_texts(self.held, store))

    def half(self) -> bool:
        """Return whether they were kept in float16; the first chunk is opened for it."""
        if not isinstance(self.held, FeatureDump):
            return False
        with self.held.opened(self.held.files(int(self.source.key))[0]) as chunk:
            return chunk.dtype == HALF

    def analyzed(self, scratch: Path) -> CodeAnalysis:
        """Walk them once."""
        return analyzed_codes(self.source, scratch)


def open_kept(
    dump: Path | None, features: Path | None, scratch: Path, layer: int | None
) -> KeptCodes | None:
    """Return kept codes of a layer, or the only ones; None where there are none.

    Args:
        dump: A folder of dense codes.
        features: The folder of a feature store.
        scratch: A folder of ours for the chunk that is being read.
        layer: Which layer; None for the only one.

    Raises:
        MismatchError: If there are several layers and none is chosen, or the chosen one is missing.
    """
    if dump is not None:
        held = FeatureDump(dump, scratch)
        chosen = _one_layer(held.layers, layer, str(dump))
        return KeptCodes(of_dump(held, [chosen])[0], held)
    if features is not None:
        store = FeatureStore(features)
        chosen = _one_layer(tuple(dict.fromkeys(store.layers)), layer, str(store.folder))
        return KeptCodes(of_features(store, [chosen])[0], store)
    return None


def same_texts(features: StoreReader, store: StoreReader) -> bool | None:
    """Return whether features are of texts that a store holds; None where only some of them are.

    Args:
        features: Features, and the texts they are of.
        store: Activations, and the texts they are of.
    """
    kept, held = ({one.get("text") for one in source.examples()} for source in (features, store))
    shared = kept & held
    if None in kept | held or kept == shared:
        return None if None in kept | held else True
    return None if shared else False


def _one_layer(layers: Sequence[int], wanted: int | None, place: str) -> int:
    if wanted is not None and wanted in layers:
        return wanted
    if len(layers) == 1:
        return layers[0]
    raise MismatchError(
        f"{place} holds codes of layers {list(layers)}"
        f"{'' if wanted is None else f', not of {wanted}'}.",
        then="Say which one: --layer.",
    )


def analyzed_codes(source: CodeSource, scratch: Path) -> CodeAnalysis:
    """Walk codes once; tokens with NaN or infinity are left out."""
    return analyze_codes(
        source, sample_tokens=SAMPLE_TOKENS, seed=0, nonfinite="mask", scratch=scratch
    )
