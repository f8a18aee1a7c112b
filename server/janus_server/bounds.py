"""Bounds of a config's numbers: written beside the field, enforced by `command_line.parse`.

threads: Annotated[int, Between(1, 1024)] = 1
"""

from dataclasses import dataclass
from typing import Annotated

from janus_server.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Between:
    """From `low` to `high`, both included; for each number of a tuple, and for an optional one."""

    low: float
    high: float

    def check(self, flag: str, value: object) -> None:
        """Refuse numbers out of bounds, nan included; raises ConfigError that names the flag."""
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if not number >= self.low:
                raise ConfigError(f"--{flag} must be at least {self.low}, not {number}")
            if number > self.high:
                raise ConfigError(f"--{flag} must be at most {self.high}, not {number}")


Seconds = Annotated[float, Between(0.001, 86_400)]
"""A deadline: clocks below count in milliseconds, and nobody waits for longer than a day."""

Threads = Annotated[int, Between(1, 1024)]
"""CPU threads of a process."""
