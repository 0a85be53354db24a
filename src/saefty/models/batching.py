"""Which examples share a forward pass: a plan made once, from lengths alone.

Batches are fixed before the first forward pass, because a row's value changes in its last bits with
the number of rows beside it: an interrupted job must meet the same batches again. Sorting by length
within a window removes nearly all padding (measured: 2 % over windows of 1,024 prompts) and keeps
the batches of one window together, so that work can be cut at its borders.
"""

from collections.abc import Sequence

DEFAULT_TOKEN_BUDGET = 1024
DEFAULT_WINDOW = 1024


def plan_batches(
    lengths: Sequence[int],
    token_budget: int = DEFAULT_TOKEN_BUDGET,
    window: int = DEFAULT_WINDOW,
) -> list[list[int]]:
    """Return batches of indices into `lengths`; every index occurs once.

    The same lengths always give the same plan. Within a window of consecutive items the longest
    come first, so that a batch too large for the memory fails at the start.

    Args:
        lengths: Tokens of each item.
        token_budget: Most tokens in a batch, padding counted; a longer item gets its own batch.
        window: How many consecutive items are sorted together.

    Raises:
        ValueError: If the budget or the window is not positive.

    Example:
        >>> plan_batches([2, 9, 3, 2], token_budget=6)
        [[1], [2, 0], [3]]
    """
    if token_budget < 1 or window < 1:
        raise ValueError(f"token_budget and window are at least 1, not {token_budget} and {window}")
    plan: list[list[int]] = []
    for start in range(0, len(lengths), window):
        items = range(start, min(start + window, len(lengths)))
        batch: list[int] = []
        for item in sorted(items, key=lambda item: (-lengths[item], item)):
            if batch and (len(batch) + 1) * lengths[batch[0]] > token_budget:
                plan.append(batch)
                batch = []
            batch.append(item)
        if batch:
            plan.append(batch)
    return plan
