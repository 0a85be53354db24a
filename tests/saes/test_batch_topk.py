import pytest
import torch

from saefty.kernels.base import KERNELS
from saefty.saes.base import SaeConfig

KERNEL = KERNELS["reference"]()
# With k = 2, three rows share six places: the first row fires one latent, the last three.
X = torch.tensor([[9.0, 1.0, 0.5, -1.0], [8.0, 7.0, 2.0, 1.5], [6.0, 5.0, 4.0, 0.1]])


def make(k=2):
    sae = SaeConfig("batch_topk", 4, 4, k).build()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    return sae


def test_the_rows_of_a_batch_share_k_places_each():
    wanted = [[9, 0, 0, 0], [8, 7, 0, 0], [6, 5, 4, 0]]
    assert make().activate_in_training(X).tolist() == wanted
    assert make().training_code(X, KERNEL).dense(4).tolist() == wanted


def test_the_first_threshold_is_the_smallest_selected_value():
    sae = make()
    sae.observe(sae.training_code(X, KERNEL))
    assert sae.threshold.tolist() == [4.0] * 4


def test_later_thresholds_move_a_hundredth_of_the_way():
    sae = make()
    sae.observe(sae.training_code(X, KERNEL))
    sae.observe(sae.training_code(X * 2, KERNEL))
    assert sae.threshold[0] == pytest.approx(0.99 * 4 + 0.01 * 8)


def test_the_calibrated_threshold_lets_k_latents_fire_on_average():
    sae = make()
    sae.calibrate(X)
    assert sae.threshold[0] == 3.0  # halfway between 4, the sixth largest, and 2, the seventh
    assert sae.encode_sparse(X).l0.float().mean() == 2


def test_a_threshold_of_zero_is_set_where_fewer_values_are_positive():
    sae = make(k=4)
    sae.calibrate(X)
    assert sae.threshold[0] == 0
    assert (sae.encode(X) > 0).sum() == 11


def test_inference_compares_each_value_with_the_threshold_alone():
    sae = make()
    sae.threshold.fill_(4.5)
    assert sae.encode(X[:1] * 0.5 + 0.25).tolist() == [[4.75, 0, 0, 0]]
