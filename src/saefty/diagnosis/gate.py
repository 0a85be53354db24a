"""What `encode` says when features look like no code of the SAE they are from.

Only what is far off counts here: texts of another kind than the SAE's own move L0 too. `saefty sae
verify` measures FVU as well, and looks for the cause.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from saefty import fsio
from saefty.diagnosis.record import AVERAGE_L0, METRICS
from saefty.diagnosis.verdict import active_limits
from saefty.errors import SaeftyError
from saefty.fidelity import ALWAYS_ON
from saefty.stores.features import FeatureStore

FAR = 2.0
"""How many times more, or fewer, latents than recorded are far off."""
MORE_ALWAYS_ON = 0.05
"""Share of the latents that may be always on beyond the record."""
LEAST_TOKENS = 200


def odd_features(store: FeatureStore) -> Iterator[str]:
    """Yield a warning for each SAE of a feature store whose L0 or always-on share is far off.

    Args:
        store: A complete store; what its SAEs should do is read beside them, where that is there.
    """
    n = store.n_tokens
    if n < LEAST_TOKENS:
        return
    for key, folder in store.manifest["saes"].items():
        fired = store.firing_counts(int(key) if key.isdecimal() else key)
        l0, always = (
            float(fired.sum()) / n,
            float(np.mean(fired.astype(np.float64) >= ALWAYS_ON * n)),
        )
        found = active_limits(l0, len(fired), always, 0.0)
        if l0 == 0:
            found.append("no latent fires on any token")
        recorded_l0, recorded_always = _recorded(folder)
        if recorded_l0 and not recorded_l0 / FAR <= l0 <= recorded_l0 * FAR:
            found.append(f"L0 is {l0:.4g} latents a token, recorded {recorded_l0:.4g}")
        if recorded_always is not None and always > recorded_always + MORE_ALWAYS_ON:
            found.append(
                f"{always:.1%} of the latents are always on, recorded {recorded_always:.1%}"
            )
        if found:
            yield (
                f"the features of layer {key} are far from what the SAE gives: {'; '.join(found)}. "
                f"Find the cause with: saefty sae verify {folder or 'SAE'} --model MODEL --data "
                "TEXTS"
            )


def _recorded(folder: str | None) -> tuple[float | None, float | None]:
    """Return what is known of an SAE: L0, and the share of its latents that are always on.

    They are from its training's metrics; else the L0 is the one that its folder's name states.
    """
    path = Path(folder) / METRICS if folder else None
    if path is None or not path.is_file():
        named = AVERAGE_L0.search(folder or "")
        return (float(named[1]) if named else None), None
    try:
        metrics = fsio.read_json(path)
    except SaeftyError:
        return None, None
    if not isinstance(metrics, dict):
        return None, None
    values = [metrics.get(name) for name in ("l0_mean", "always_on_share")]
    l0, always = (float(v) if isinstance(v, int | float) else None for v in values)
    return l0, always
