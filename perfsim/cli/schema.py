"""`perfsim schema`: the JSON Schema of a scenario file, for editors and generators."""

from __future__ import annotations

from perfsim.cli.common import print_json


def schema() -> None:
    """Print the JSON Schema of a scenario YAML file."""
    from perfsim.spec.scenario_file import ScenarioFile

    content = ScenarioFile.model_json_schema(mode="validation")
    content["title"] = "perfsim scenario"
    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **content})
