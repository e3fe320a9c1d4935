"""What an engine's command line means for a scenario, collected rule by rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from perfsim.errors import InputError
from perfsim.spec.command_line.table import FlagTable
from perfsim.spec.hardware import Accelerator
from perfsim.spec.model import MixtureOfExperts, ModelArch


@dataclass(frozen=True, slots=True)
class Setting:
    """One scenario key, its value, and the flag that says so (None: the engine's default)."""

    key: str
    value: Any
    flag: str | None


@dataclass(slots=True, kw_only=True)
class Plan:
    """The scenario keys that the flags of one command line stand for, and what has to be said about them.

    `values` are the flags by long name; `chosen(key)` is what the user wrote for a scenario key elsewhere (`--set`,
    `--tp`), which wins over the command line; `options` is the engine's own options file. `missing` are keys that the
    command line leaves open and no default may fill.
    """

    table: FlagTable
    values: dict[str, Any]
    model: ModelArch
    accelerator: Accelerator
    chosen: Callable[[str], Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: list[Setting] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)

    def get(self, flag: str, default: Any = None) -> Any:
        """The value of a flag, or `default` when it is not given."""
        value = self.values.get(flag)
        return default if value is None else value

    def set(self, key: str, value: Any, flag: str | None = None) -> None:
        """Let `key` be `value` unless the user wrote something else; `flag` is the long name that says so."""
        self.settings.append(Setting(key, value, None if flag is None else self.spelled(flag)))

    def setting(self, key: str, default: Any = None) -> Any:
        """What `key` will be: the user's own value, else that of the command line."""
        own = self.chosen(key)
        if own is not None:
            return own
        return next((found.value for found in reversed(self.settings) if found.key == key), default)

    def warn(self, flag: str, text: str) -> None:
        """Say something about a flag that is not taken as it stands."""
        self.warnings.append(f"{self.spelled(flag)}: {text}")

    def require(self, key: str, why: str) -> None:
        """A key that the command line does not say and that must not be guessed."""
        self.missing.append((key, why))

    def refuse(self, flag: str, text: str) -> InputError:
        """The error for a flag that the engine itself would refuse."""
        return InputError(f"{self.spelled(flag)}: {text}")

    def spelled(self, flag: str) -> str:
        """A flag as it is written: `--max-num-seqs`."""
        return self.table.named(flag).names[0]

    @property
    def is_mixture(self) -> bool:
        """Whether the model has routed experts."""
        return any(isinstance(group.mlp, MixtureOfExperts) for group in self.model.layers)
