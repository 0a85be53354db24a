"""A TopK SAE and every figure of its latents, worked out the plain way, latent by latent.

NumPy in float64, SciPy and scikit-learn. Nothing of the package is imported, so that what is
checked against this shares no mistake with it.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold


@dataclass(frozen=True)
class PlainTopK:
    """A TopK SAE that reads scaled rows, taken out of weights into which the scaling is folded."""

    mean: np.ndarray
    scale: np.ndarray
    unit: float
    """What latents of scaled rows are times: the scale's root mean square."""
    weights: dict
    k: int

    @classmethod
    def of(cls, weights, scaler, k):
        """Take the scaling out of the weights of a file again."""
        w = {name: np.asarray(value, dtype=np.float64) for name, value in weights.items()}
        mean, scale = (np.array(scaler[name]) for name in ("mean", "scale"))
        unit = float(np.sqrt((scale**2).mean()))
        plain = {
            "W_enc": w["W_enc"] * scale[:, None] / unit,
            "b_enc": (w["b_enc"] + mean @ w["W_enc"]) / unit,
            "W_dec": w["W_dec"] * unit / scale,
            "b_dec": (w["b_dec"] - mean) / scale,
        }
        return cls(mean, scale, unit, plain, k)

    def folded(self):
        """Return the weights that read and write rows as they are, in float32."""
        w = self.weights
        raw = {
            "W_enc": w["W_enc"] / self.scale[:, None] * self.unit,
            "b_enc": (w["b_enc"] - self.mean / self.scale @ w["W_enc"]) * self.unit,
            "W_dec": w["W_dec"] * self.scale / self.unit,
            "b_dec": w["b_dec"] * self.scale + self.mean,
        }
        return {name: np.ascontiguousarray(value, np.float32) for name, value in raw.items()}

    def encode(self, x):
        """Return the latents of rows: the k largest of each, and of those what is above 0."""
        pre = (x - self.mean) / self.scale @ self.weights["W_enc"] + self.weights["b_enc"]
        z = np.zeros_like(pre)
        for row, values in enumerate(pre):
            for latent in sorted(range(len(values)), key=lambda i: -values[i])[: self.k]:
                z[row, latent] = max(values[latent], 0.0)
        return z * self.unit

    def decode(self, z):
        """Return rows from latents."""
        scaled = z / self.unit @ self.weights["W_dec"] + self.weights["b_dec"]
        return scaled * self.scale + self.mean

    def added(self, z, latents):
        """Return Σ z_k W_k over some latents, in units of the rows."""
        total = np.zeros((len(z), len(self.mean)))
        for k in latents:
            total += np.outer(z[:, k] / self.unit, self.weights["W_dec"][k] * self.scale)
        return total


def fidelity(x, sae):
    """Return how faithful an SAE is on rows, and how it fires."""
    z = sae.encode(x)
    error = ((x - sae.decode(z)) ** 2).sum()
    fvu = error / ((x - x.mean(axis=0)) ** 2).sum()
    rate = (z > 0).mean(axis=0)
    return {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0_mean": (z > 0).sum(axis=1).mean(),
        "silent_share": (rate == 0).mean(),
        "always_on_share": (rate >= 0.99).mean(),
    }


def halves(harmful, seed=0):
    """Return which examples choose and which report: each label dealt out in a random order."""
    rng = np.random.default_rng([seed, 3])
    selection = np.zeros(len(harmful), dtype=bool)
    for label in (False, True):
        rows = np.flatnonzero(harmful == label)
        selection[rows[rng.permutation(len(rows))][::2]] = True
    return selection, ~selection


def gaussian_kl(one, other):
    """Return KL(one ‖ other) of two samples as Gaussians, variances of 1 % of both's at least."""
    both = np.concatenate([one, other])
    if both.max() == both.min():
        return 0.0
    v1, v0 = (max(values.var(), 0.01 * both.var()) for values in (one, other))
    return 0.5 * (v1 / v0 + (one.mean() - other.mean()) ** 2 / v0 - 1 - np.log(v1 / v0))


def histogram_kl(one, other):
    """Return KL(one ‖ other) of two samples in 20 bins over both and 0, each with one more."""
    both = np.concatenate([one, other])
    ends = (min(both.min(), 0), max(both.max(), 0))
    if both.max() == both.min():
        return 0.0
    counts = [np.histogram(values, bins=20, range=ends)[0] + 1 for values in (one, other)]
    p, q = (count / count.sum() for count in counts)
    return (p * np.log(p / q)).sum()


def latent_scores(z, harmful):
    """Return every score of every latent on some examples."""
    width = z.shape[1]
    names = ("dfreq", "dmag", "auroc", "kl", "kl_histogram", "fires", "p", "q")
    scores = {name: np.zeros(width) for name in names}
    for k in range(width):
        one, other = z[harmful, k], z[~harmful, k]
        scores["dfreq"][k] = (one > 0).mean() - (other > 0).mean()
        scores["dmag"][k] = one.mean() - other.mean()
        scores["auroc"][k] = roc_auc_score(harmful, z[:, k])
        scores["kl"][k] = gaussian_kl(one, other)
        scores["kl_histogram"][k] = histogram_kl(one, other)
        scores["fires"][k] = (z[:, k] > 0).mean()
        scores["p"][k] = whitney(one, other)
    fires = scores["fires"] > 0
    for name in ("kl", "kl_histogram"):
        scores[name] = np.minimum(scores[name], np.percentile(scores[name][fires], 99))
    scores["q"][:] = 1.0
    scores["q"][fires] = false_discovery_control(scores["p"][fires], method="bh")
    scores["consensus"] = np.where(fires, _consensus(scores, fires), 0.0)
    return scores


def whitney(one, other):
    """Return the two-sided p of Mann and Whitney's test, with ties."""
    if len(np.unique(np.concatenate([one, other]))) == 1:
        return 1.0
    return mannwhitneyu(one, other, alternative="two-sided", method="asymptotic").pvalue


def _consensus(scores, fires):
    terms = {
        "dfreq": (scores["dfreq"], 1.0),
        "dmag": (scores["dmag"], 1.0),
        "auroc": (scores["auroc"] - 0.5, 1.0),
        "kl": (np.sign(scores["dmag"]) * scores["kl"], 0.5),
    }
    total = sum(w * (v - v[fires].mean()) / v[fires].std() for v, w in terms.values())
    return total / sum(weight for _, weight in terms.values())


def exact_maximum_p(z, harmful):
    """Return for each latent how many of all labellings let some latent do at least as well."""
    n, k = len(harmful), int(harmful.sum())
    chosen = np.array(list(combinations(range(n), k)))
    labellings = np.zeros((len(chosen), n))
    np.put_along_axis(labellings, chosen, 1.0, axis=1)
    # U is the number of pairs (harmful, harmless) in which the harmful one is larger, ties half.
    larger = (np.sign(z[:, None] - z[None]) + 1) / 2
    best, own = np.zeros(len(chosen)), np.zeros(z.shape[1])
    for latent in range(z.shape[1]):
        pairs = larger[:, :, latent]
        u = ((labellings @ pairs) * (1 - labellings)).sum(axis=1)
        best = np.maximum(best, np.abs(u / (k * (n - k)) - 0.5))
        own[latent] = abs(roc_auc_score(harmful, z[:, latent]) - 0.5)
    return np.array([(best >= value - 1e-10).mean() for value in own])


def holm(p):
    """Return p values adjusted by Holm's procedure."""
    adjusted, largest = np.zeros(len(p)), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, p[i] * (len(p) - rank))
        adjusted[i] = min(largest, 1.0)
    return adjusted


def controls_of(targets, z, sae, area):
    """Return for each target the free latent that is as active, among those that tell no label."""
    norms = np.linalg.norm(sae.weights["W_dec"] * sae.scale / sae.unit, axis=1)
    activity = z.mean(axis=0) * norms
    free = [
        k for k in range(z.shape[1])
        if activity[k] > 0 and abs(area[k] - 0.5) <= 0.1 and k not in targets
    ]  # fmt: skip
    found = []
    for target in targets:
        if free:
            found.append(min(free, key=lambda k: abs(np.log(activity[k] / activity[target]))))
            free.remove(found[-1])
    return found


class HarmProbe:
    """Logistic regression on standardised rows, its penalty chosen on three folds."""

    STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)

    def __init__(self, x, harmful, *, scale_in_folds, seed=0):
        folds = list(
            StratifiedGroupKFold(3, shuffle=True, random_state=seed).split(
                x, harmful, np.arange(len(x))
            )
        )
        best = np.inf
        for strength in self.STRENGTHS:
            loss, held_out = 0.0, np.zeros(len(x))
            for inner, outer in folds:
                learn = inner if scale_in_folds else slice(None)
                mean, std = x[learn].mean(axis=0), x[learn].std(axis=0)
                model = self._fitted((x[inner] - mean) / std, harmful[inner], strength)
                held_out[outer] = model.decision_function((x[outer] - mean) / std)
                sign = np.where(harmful[outer], 1, -1)
                loss += np.log1p(np.exp(-sign * held_out[outer])).mean()
            if loss < best:
                best, self.strength, self.held_out = loss, strength, held_out
        self.mean, self.std = x.mean(axis=0), x.std(axis=0)
        self.model = self._fitted((x - self.mean) / self.std, harmful, self.strength)

    @staticmethod
    def _fitted(x, harmful, strength):
        return LogisticRegression(C=strength, max_iter=1000).fit(x, harmful)

    def score(self, x):
        """Return the log-odds of rows."""
        return self.model.decision_function((x - self.mean) / self.std)


def gating_figures(x, gated, harmful, selection, report, false_alarms):
    """Return what is left of the evidence of harm in rows that were gated, on the report half."""
    probe = HarmProbe(x[selection], harmful[selection], scale_in_folds=True)
    harmless = sorted(probe.held_out[~harmful[selection]], reverse=True)
    threshold = harmless[int(false_alarms * len(harmless))]
    before, after = (probe.score(rows[report]) > threshold for rows in (x, gated))
    truth = harmful[report]
    anew = HarmProbe(gated[selection], harmful[selection], scale_in_folds=False)
    figures = {
        "threshold": threshold,
        "safety": (~after[truth & before]).mean() if (truth & before).any() else np.nan,
        "changed": (before != after)[~truth].mean(),
        "auroc": roc_auc_score(truth, probe.score(gated[report])),
        "relearnt": roc_auc_score(truth, anew.score(gated[report])),
    }
    for name, mask in (("harmful", truth), ("harmless", ~truth)):
        one, other = x[report][mask], gated[report][mask]
        norms = np.linalg.norm(one, axis=1)
        figures[f"called_{name}"] = after[mask].mean()
        figures[f"relative_{name}"] = (np.linalg.norm(other - one, axis=1) / norms).mean()
        figures[f"cosine_{name}"] = (
            (one * other).sum(axis=1) / norms / np.linalg.norm(other, axis=1)
        ).mean()
    return figures
