"""Of all tests: failed assertions in tests/support are explained as those of tests are."""

import ctypes
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.support")


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(autouse=True)
def _keep_signal_stack() -> Iterator[None]:
    """Give pytest's faulthandler its signal stack back.

    OpenVINO puts another in its place and frees that, so that the next signal ends the process.
    """
    before, libc = _SignalStack(), ctypes.CDLL(None)
    libc.sigaltstack(None, ctypes.byref(before))
    yield
    libc.sigaltstack(ctypes.byref(before), None)
