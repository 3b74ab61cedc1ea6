"""One root for every error that this package raises on purpose.

    ChelaBenchError                  exit code 2 where the command line meets one
    ├── UsageError                   a flag or an argument that cannot be carried out
    │   └── ConfigError              bench.toml: file, key, what was expected, what came
    ├── RecordError                  a run folder that cannot be read, or that is not the same run
    ├── BaselineProblem              exit code 4: no such baseline, or of another machine
    ├── EnvironmentProblem           exit code 6: no such device, device taken, tool missing
    └── ArgumentError (ValueError)   a tensor or option that a kernel or reference cannot take

A message says what was wanted, what came, and the way out. Anything else that escapes is a bug
and keeps its traceback.
"""


class ChelaBenchError(Exception):
    """Root of all errors raised on purpose by chela_bench."""

    exit_code = 2


class UsageError(ChelaBenchError):
    """A flag, name or value on the command line that cannot be carried out."""


class ConfigError(UsageError):
    """bench.toml is missing, unreadable, or has a key or value of the wrong kind."""


class RecordError(ChelaBenchError):
    """A run folder is damaged, of another schema, or of another machine or configuration."""


class BaselineProblem(ChelaBenchError):
    """A baseline is missing, damaged, of another machine, or of another Triton."""

    exit_code = 4


class EnvironmentProblem(ChelaBenchError):
    """The machine lacks what was asked for: a device, a free device, a tool."""

    exit_code = 6


class ArgumentError(ChelaBenchError, ValueError):
    """A tensor's shape, dtype or device, or an option, that a kernel or reference cannot take."""
