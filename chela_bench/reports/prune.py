"""An atlas as a Python module that keeps triton.autotune from trying what cannot run."""

from __future__ import annotations

import pprint
from collections.abc import Sequence

from chela_bench.records import AtlasRow
from chela_bench.reports.atlas import Config, config_of

_HEAD = '''"""Which configurations cannot run, by kernel and architecture, found by compiling them.

Written by `chela-bench atlas --export-prune` with Triton {triton}, for {dtype} and these constants:
other ones may need more or less.

    import triton
    from {module} import early_config_prune

    @triton.autotune(
        configs=[...], key=[...], prune_configs_by={{"early_config_prune": early_config_prune}}
    )
    @triton.jit
    def kernel(...): ...

`early_config_prune` drops a configuration that no kernel of the table runs with;
`prune("kernel")` looks at one kernel alone. What the table does not know is kept, and so is what
a compiler crashed on or took too long for.
"""

# kernel -> architecture -> [(configuration, None or why it cannot run)]
TABLE = '''

_UNKNOWN = """

# kernel -> architecture -> [configuration whose compiler crashed or took too long]
UNKNOWN = """

_CODE = '''

def prune(kernel=None, arch=None):
    """An early_config_prune for a kernel (None: all of the table) on an architecture (None: that of
    the current GPU)."""
    kernels = list(TABLE) if kernel is None else [kernel]
    tables, unknown = ([table[each] for each in kernels] for table in (TABLE, UNKNOWN))

    def early_config_prune(configs, named_args, **kwargs):
        name = arch or current_arch()
        kept, dropped = [], []
        for config in configs:
            asked = {**config.kwargs, "num_warps": config.num_warps,
                     "num_stages": config.num_stages}

            def meant(row):
                return set(config.kwargs) <= set(row) and all(
                    row[key] == asked[key] for key in row if key in asked)

            known = [why for table in tables for row, why in table.get(name, ()) if meant(row)]
            open_ = any(meant(row) for table in unknown for row in table.get(name, ()))
            if known and not open_ and all(why is not None for why in known):
                dropped.append(f"{config}: {known[0]}")
            else:
                kept.append(config)
        if configs and not kept:
            raise RuntimeError(f"no configuration runs on {name}: " + "; ".join(dropped))
        return kept

    return early_config_prune


def current_arch():
    """`sm_90` on an H100."""
    import torch

    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


early_config_prune = prune()
'''


def prune_module(rows: Sequence[AtlasRow], module: str) -> str:
    """The module's text; `module` is the name that it is imported by."""
    table: dict[str, dict[str, list[tuple[dict[str, object], str | None]]]] = {}
    unknown: dict[str, dict[str, list[dict[str, object]]]] = {}
    for (kernel, arch, config), same in _by_config(rows).items():
        known = table.setdefault(kernel, {}).setdefault(arch, [])
        not_known = unknown.setdefault(kernel, {}).setdefault(arch, [])
        if any(row.fits for row in same):  # with some of its flags
            known.append((dict(config), None))
        elif all(row.known for row in same):
            known.append((dict(config), same[0].reason or same[0].outcome))
        else:
            not_known.append(dict(config))
    head = _HEAD.format(
        triton=rows[0].triton if rows else "none",
        dtype=" and ".join(dict.fromkeys(row.dtype for row in rows)),
        module=module,
    )
    return f"{head}{_literal(table)}{_UNKNOWN}{_literal(unknown)}{_CODE}"


def _by_config(rows: Sequence[AtlasRow]) -> dict[tuple[str, str, Config], list[AtlasRow]]:
    found: dict[tuple[str, str, Config], list[AtlasRow]] = {}
    for row in rows:
        found.setdefault((row.kernel, row.arch, config_of(row)), []).append(row)
    return found


def _literal(table: object) -> str:
    return pprint.pformat(table, width=100, sort_dicts=False) + "\n"
