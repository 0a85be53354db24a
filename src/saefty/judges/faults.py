"""What an endpoint can answer: a rating's words, or a fault that passes, or one that stays."""

import email.utils
import math
import time
from collections.abc import Mapping
from typing import Any

from saefty.judges.answers import Answer

PASSING = (408, 409, 425, 429)
NO_KEY, NO_MONEY, NOT_THERE = (401, 403), 402, (404, 410)
NO_QUOTA = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
NO_MODEL = ("model_not_found", "model_not_available", "deployment_not_found")
SHOWN = 200
"""Characters of an endpoint's own words in a message."""


class PassingError(Exception):
    """A fault that may be gone on the next try."""

    def __init__(self, reason: str, *, after: float = 0.0, charged: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.after = after
        """Seconds that the endpoint asks to wait."""
        self.charged = charged
        """Whether the endpoint may have done the work all the same."""


class QuestionError(Exception):
    """A fault of this one question, which stays."""


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds that an endpoint asks to wait; 0 where it asks for none, or nonsense."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if not value:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return 0.0


def read_answer(reply: Any) -> tuple[Answer, bool]:
    """Return the answer that a reply holds, and whether it says what it cost.

    Raises:
        ValueError: If it holds none.
    """
    choices = getattr(reply, "choices", None)
    if not choices:
        raise ValueError(f"no choices in {str(reply)[:SHOWN]!r}")
    message, usage = choices[0].message, getattr(reply, "usage", None)
    text = message.content if isinstance(message.content, str) else None
    if text is None:
        text = getattr(message, "refusal", None) or ""
    tokens_in, tokens_out = (
        getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")
    )
    charged = isinstance(tokens_in, int) and isinstance(tokens_out, int)
    finish = choices[0].finish_reason
    answer = Answer(
        text=_whole(text),
        finish=_whole(finish) if isinstance(finish, str) else None,
        tokens_in=int(tokens_in or 0) if charged else 0,
        tokens_out=int(tokens_out or 0) if charged else 0,
        model=_whole(str(getattr(reply, "model", "") or "")),
    )
    return answer, charged


def _whole(text: str) -> str:
    """Return text without halves of surrogate pairs: JSON may hold them, no file can."""
    return text.encode("utf-8", "replace").decode("utf-8")
