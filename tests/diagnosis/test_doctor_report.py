"""What a report of the doctor can say at once, and of which texts kept codes are."""

import numpy as np
import pytest

from saefty.diagnosis.doctor_report import DoctorReport, _printed
from saefty.diagnosis.finding import Finding
from saefty.diagnosis.judgement import Diagnosis
from saefty.diagnosis.kept_codes import same_texts
from saefty.metrics.firing import firing_stats
from saefty.stores.base import StoreReader

SICK = Finding("dense", "sick", "The codes are not sparse.", {})
STATS = firing_stats([np.eye(4)])


def test_no_sick_finding_stands_below_a_healthy_verdict():
    healthy = DoctorReport("sae", (SICK,), {}, STATS, Diagnosis(True, "Healthy: all is well.", ()))
    assert healthy.healthy
    assert [one.severity for one in healthy.findings] == ["warning"]
    assert "[sick]" not in healthy.text()
    assert "[warning] The codes are not sparse." in healthy.text()


def test_a_sick_finding_stays_where_the_verdict_is_sick():
    for diagnosis in (Diagnosis(False, "Sick: dense.", (SICK,)), None):
        report = DoctorReport("sae", (SICK,), {}, STATS, diagnosis)
        assert not report.healthy
        assert "[sick] The codes are not sparse." in report.text()


def test_a_gain_of_nothing_has_no_sign_of_its_own():
    shown = _printed({"gain": "gain"}, [{"gain": -0.001}, {"gain": 0.0}, {"gain": -0.3}])
    assert "-0.00" not in shown
    assert shown.count("+0.00") == 2
    assert "-0.30" in shown


class Texts(StoreReader):
    def __init__(self, *texts):
        self._texts = texts

    def examples(self):
        return [{"text": text} for text in self._texts]


@pytest.mark.parametrize(
    ("kept", "same"),
    [(("b",), True), (("b", "a"), True), (("c", "d"), False), (("a", "c"), None), ((None,), None)],
)
def test_features_are_of_texts_that_the_store_holds_or_of_others(kept, same):
    assert same_texts(Texts(*kept), Texts("a", "b")) is same
