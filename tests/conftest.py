"""What holds for all tests."""

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.support")

# How long an example takes says how busy the machine is: another test runs at the same time.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
