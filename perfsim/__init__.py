"""perfsim: how fast, how full and how dear an LLM serving system would be, before anyone rents the GPUs.

    import perfsim as ps

    scenario = ps.Scenario.load("workloads/scenarios/default.yaml").replace(seed=1)
    result = ps.simulate(scenario)

Names are looked up on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfsim.metrics.result import Result as Result
    from perfsim.run import estimate as estimate
    from perfsim.run import simulate as simulate
    from perfsim.spec.scenario import Scenario as Scenario

__version__ = "0.1.0"
__all__ = ["Result", "Scenario", "__version__", "estimate", "simulate"]

_HOME = {
    "Result": "perfsim.metrics.result",
    "Scenario": "perfsim.spec.scenario",
    "estimate": "perfsim.run",
    "simulate": "perfsim.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'perfsim' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
