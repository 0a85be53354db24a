"""BatchTopK: keep the k · rows largest pre-activations of a whole batch; a threshold at inference.

Source: Bussmann, Leask, Nanda 2024, "BatchTopK sparse autoencoders" (arXiv:2412.06410). Departure:
at the end the threshold is set so that held-out rows have k firing latents on average; the paper
keeps the moving average. What it shares with others of its kind is in `threshold.py`.
"""

from saefty.saes.base import ARCHITECTURES
from saefty.saes.threshold import Thresholded


@ARCHITECTURES.register("batch_topk")
class BatchTopK(Thresholded):
    """The k · rows largest of a batch; a fixed threshold once trained."""
