"""`perfsim estimate`: the closed form, without replaying the traffic."""

from __future__ import annotations

from perfsim.cli.common import (
    BandsOption,
    Format,
    FormatOption,
    SamplesOption,
    ScenarioFlags,
    check_bands,
    takes_scenario,
    with_report,
)
from perfsim.cli.simulate import print_result


@takes_scenario
def estimate(
    flags: ScenarioFlags,
    output: FormatOption = Format.table,
    samples: SamplesOption = None,
    bands: BandsOption = True,
) -> None:
    """Estimate a scenario in closed form: milliseconds instead of a simulation, for scanning many of them."""
    from perfsim.run import estimate as run_estimate

    check_bands(bands=bands, samples=samples)
    scenario, report = flags.resolve_command()
    print_result(with_report(run_estimate(scenario, bands=bands, samples=samples), report), output=output)
