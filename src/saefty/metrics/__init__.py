"""Numbers about latents: how often they fire, what they have to do with harm, and how sure that is.

Everything here reads NumPy and SciPy arrays and knows nothing of models. The two shapes are
[tokens, d_sae] for `firing` and [examples, d_sae] (latents pooled over each example's tokens) for
all else, sparse throughout: a dense matrix of 65,536 latents is never made.
"""
