"""From a running training to a checkpoint's content, and back."""

from __future__ import annotations

from runkey.training.checkpoint.content import Content
from runkey.training.setup import Setup, announce
from runkey.training.state import LoopState


def take_content(setup: Setup, state: LoopState) -> Content:
    """What has to be saved at this boundary of a step; tensors are not copied."""
    return Content(
        step=state.step,
        state=state.as_plain(),
        parts={name: part.state_dict() for name, part in setup.parts.items()},
        position=setup.tracker.position(),
        best_weights=state.best_weights,
    )


def put_back(setup: Setup, content: Content) -> None:
    """Give model, average, optimizer and so on the content's tensors."""
    for name, part in setup.parts.items():
        part.load_state_dict(content.parts[name])


def begin(setup: Setup) -> LoopState:
    """The state that training starts from: of the newest checkpoint, else a new one."""
    content = setup.checkpoints.load() if setup.checkpoints else None
    choices = announce(setup)
    if content is None:
        setup.tracker.resume(None)
        setup.tracker.event("training_start", **choices)
        return LoopState()
    put_back(setup, content)
    setup.tracker.resume(content.position)
    exactly = f", not bit for bit: {content.changes}" if content.changes else ""
    setup.say(f"going on after step {content.step} of {setup.schedule.total_steps}{exactly}")
    setup.tracker.event("resumed", step=content.step, changes=content.changes)
    return LoopState.from_plain(content.state, content.best_weights)
