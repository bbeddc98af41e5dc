"""Of all tests: failed assertions in tests/support are explained as those of tests are."""

import pytest

pytest.register_assert_rewrite("tests.support")
