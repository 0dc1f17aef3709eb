"""Executors: turn visibilities into kernel calls that equal the dense masked formula. Knows tensors only.

plan = execute.plan(visibility)                      # chooses a lowering and says why: plan.explain()
out = plan.run(query, key, value, kernel=execute.sdpa)
"""

from __future__ import annotations

from .base import ExecutionPlan, Host, Kernel, Pass, sdpa
from .planner import plan
from .tokens import as_bias

__all__ = ["ExecutionPlan", "Host", "Kernel", "Pass", "as_bias", "plan", "sdpa"]
