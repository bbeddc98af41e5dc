"""Failures inside a step, told with the step, its images and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from runkey.data.batch import Window
from runkey.errors import TrainingError
from runkey.training.distributed import LostRankError, SharedError
from runkey.training.split import is_out_of_memory
from runkey.training.step import image_ids_of

_MOST_IDS_SHOWN = 8


@contextmanager
def explained(step: int, window: Window, lr: float) -> Iterator[None]:
    """Turn what can go wrong in a step into one line that a user can act on.

    Args:
        step: its number, from 1.
        window: its images.
        lr: its rate.

    Raises:
        StoppedError: memory ran out with one image, or a rank has ended.
        TrainingError: memory ran out, an operation has no deterministic form, or the criterion
            found something that is not finite.
    """
    try:
        yield
    except LostRankError:
        raise
    except SharedError as error:
        raise SharedError(f"step {step} (lr {lr:.3g}), {error}") from error
    except TrainingError as error:
        raise type(error)(
            f"step {step} (lr {lr:.3g}, images {shown_ids(image_ids_of(window))}): {error}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingError(
                f"step {step}: memory ran out outside of the forward and backward passes, where"
                " smaller batches do not help; it needs a device with more memory"
            ) from None
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not")[0]
        raise TrainingError(
            f"step {step}: {operation} has no deterministic form on this device; "
            "set training.deterministic: false"
        ) from error


def shown_ids(ids: tuple[int, ...]) -> str:
    """The first image ids, with a mark if there are more."""
    more = ", ..." if len(ids) > _MOST_IDS_SHOWN else ""
    return ", ".join(map(str, ids[:_MOST_IDS_SHOWN])) + more
