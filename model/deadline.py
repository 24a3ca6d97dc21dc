"""A deadline for calls into libraries that have none of their own.

Called where a checkpoint or data set comes from the hub, and by `pipeline/submit.py` around Ray's job client.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

HUB_DEADLINE_S = 1800.0  # a whole download; what has come by then is kept, and the next attempt goes on from there

T = TypeVar("T")


def call_within(seconds: float, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What the function returns or raises; TimeoutError once `seconds` have passed.

    A call that is given up cannot be stopped. It goes on in a daemon thread, which does not keep the process alive.
    """
    answer: Future[T] = Future()

    def call() -> None:
        try:
            answer.set_result(function(*args, **kwargs))
        except BaseException as error:  # noqa: B036 (handed to the waiting thread)
            answer.set_exception(error)

    threading.Thread(target=call, name=f"call_within {seconds:g} s", daemon=True).start()
    return answer.result(timeout=seconds)
