"""Which form of the tests runs: the quick one, or with ``HCOT_LMEVAL_FULL=1`` the full one."""

import os

import pytest

FULL = os.environ.get("HCOT_LMEVAL_FULL") == "1"

only_in_full = pytest.mark.skipif(not FULL, reason="runs with HCOT_LMEVAL_FULL=1")
