"""`perfsim estimate`: the closed form, without replaying the traffic."""

from __future__ import annotations

from perfsim.cli.common import Format, FormatOption, ScenarioFlags, takes_scenario
from perfsim.cli.simulate import print_result


@takes_scenario
def estimate(flags: ScenarioFlags, output: FormatOption = Format.table) -> None:
    """Estimate a scenario in closed form: milliseconds instead of a simulation, for scanning many of them."""
    from perfsim.run import estimate as run_estimate

    print_result(run_estimate(flags.resolve()), output=output)
