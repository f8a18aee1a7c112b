"""`janus bench`: a sub-command for each bench."""

import importlib
from collections.abc import Sequence

from janus_server.errors import ConfigError

_BENCHES = {"offline": "janus_bench.offline", "schedule": "janus_bench.schedule"}
"""Name -> module whose `command` runs it."""


def command(argv: Sequence[str]) -> int:
    """Measure Janus and its peers side by side in one run."""
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: janus bench BENCH [OPTIONS]; janus bench BENCH --help\n\nBenches:")
        for bench, module in _BENCHES.items():
            print(f"  {bench:10} {_load(module).__doc__}")
        return 0
    if name not in _BENCHES:
        raise ConfigError(f"there is no bench {name!r}; there are: {', '.join(_BENCHES)}")
    result: int = _load(_BENCHES[name])(rest)
    return result


def _load(module: str):  # type: ignore[no-untyped-def]
    try:
        return importlib.import_module(module).command
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is missing: install Janus with its bench extra (janus-moe[bench])"
        ) from None
