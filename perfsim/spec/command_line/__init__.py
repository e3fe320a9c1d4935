"""Command lines of serving engines (`vllm serve`, `sglang serve`, `trtllm-serve`) as scenarios."""

from perfsim.spec.command_line.command import CommandReport, EngineCommand, read_command

__all__ = ["CommandReport", "EngineCommand", "read_command"]
