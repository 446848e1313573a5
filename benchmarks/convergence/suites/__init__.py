"""The suites by name."""

from __future__ import annotations

from convergence.suite import Suite
from convergence.suites.r9 import R9

SUITES: dict[str, Suite] = {suite.name: suite for suite in (R9,)}
