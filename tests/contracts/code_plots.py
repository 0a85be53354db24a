"""Samples for the pictures of an analysis of codes: ordinary, dense, dead, and next to nothing."""

from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array

from saefty.code_pca import project_codes
from saefty.metrics.firing import firing_stats
from saefty.plots.repair_plane import RepairPlane, RepairPoint
from saefty.token_sample import TokenSample


def codes(rate, tokens=400, latents=300, scale=1.0):
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(tokens, latents)) * (rng.random((tokens, latents)) < rate)
    return csr_array(z * scale)


def ordinary(**keys):
    return codes(10 ** np.random.default_rng(1).normal(-2.2, 0.8, 300), **keys)


def u_shaped():
    rate = np.random.default_rng(1).choice([0.002, 0.5, 0.999, 1.0], 300, p=[0.4, 0.1, 0.25, 0.25])
    return codes(rate, scale=np.random.default_rng(2).lognormal(1, 2, 300))


STATS = {
    "normal": firing_stats(ordinary()),
    "dense": firing_stats(u_shaped()),
    "all on": firing_stats(codes(1.0)),
    "dead": firing_stats(codes(0.0)),
    "one token": firing_stats(codes(0.1, tokens=1)),
    "one firing latent": firing_stats(csr_array(np.eye(5)[:1])),
    "no token": firing_stats(codes(0.1, tokens=0)),
    "equal activations": firing_stats(csr_array((np.arange(60).reshape(20, 3) % 4 == 0) * 2.0)),
}


def projected(z):
    return project_codes(TokenSample((z,), z.shape[1]))


AS_IT_IS = RepairPoint("as it is", 148.0, 0.06, "as it is")
BIAS = RepairPoint("encoder bias off: b_enc lowered by 268", 25.6, 0.072, "cause")
OTHERS = tuple(
    RepairPoint(f"another reading {i}", 40.0 + 30 * i, 0.07, "reading") for i in range(4)
)
CURVE = ((1.0, 0.6), (6.0, 0.08), (40.0, 0.062))


def plane(*points, curve=CURVE, recorded=None):
    return RepairPlane(points, curve, 25.6, 0.5, "Sick: encoder bias off", recorded)


CODE_PLOTS = {
    "repair_plane": {
        "normal": plane(AS_IT_IS, BIAS, *OTHERS),
        "healthy": plane(AS_IT_IS, recorded=0.05),
        "no curve": plane(AS_IT_IS, BIAS, curve=()),
        "nothing to draw": plane(replace(AS_IT_IS, l0=0.0), curve=()),
    },
    **dict.fromkeys(
        ("rate_histogram", "log_rate_histogram", "top_firing_rate", "top_max_activation",
         "top_mean_when_active", "active_per_token", "firing_regions", "l0_share"), STATS,
    ),
    "code_pca": {
        "normal": projected(ordinary()),
        "dense": projected(u_shaped()),
        "dead": projected(codes(0.0)),
        "one token": projected(codes(0.1, tokens=1)),
        "no token": projected(codes(0.1, tokens=0)),
        "two tokens": projected(codes(0.1, tokens=2)),
    },
}  # fmt: skip
