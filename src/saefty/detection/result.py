"""Everything that one comparison of detectors found out."""

from collections.abc import Sequence
from dataclasses import dataclass

from saefty.baselines import Labelled
from saefty.detection.comparison import Comparison, Detector
from saefty.detection.generalisation import CategoryResult, LeftOut
from saefty.metrics.leaks import LeakWarning
from saefty.probes import ProbeTask


@dataclass(frozen=True)
class Detection:
    """What a run of `probe` found.

    Attributes:
        data: The labelled examples.
        ids: Their ids.
        categories: Their categories; None for one without.
        sources: The names of the sources, by code; one if there is only one.
        task: The split, the clusters and the seed.
        comparisons: On all training examples, and on a balanced subset where there is one.
        left_out: Leave-one-source-out; None where it was not asked for.
        rest: Each category against all other examples.
        rest_left_out: Why other categories were left out.
        leaks: Shortcuts in the data.
        d_sae: Latents of each layer's SAE.
        saved: The detector that was saved as a guard, if one was.
    """

    data: Labelled
    ids: Sequence[str]
    categories: Sequence[str | None]
    sources: Sequence[str]
    task: ProbeTask
    comparisons: tuple[Comparison, ...]
    left_out: LeftOut | None
    rest: tuple[CategoryResult, ...]
    rest_left_out: tuple[tuple[str, str], ...]
    leaks: tuple[LeakWarning, ...]
    d_sae: dict[int, int]
    saved: Detector | None = None

    @property
    def all(self) -> Comparison:
        """The comparison of detectors that learnt on all training examples."""
        return self.comparisons[0]

    @property
    def balanced(self) -> Comparison | None:
        """The comparison of detectors that learnt on a balanced subset, if there is one."""
        return self.comparisons[1] if len(self.comparisons) > 1 else None
