"""An atlas as a Python module that keeps triton.autotune from trying what cannot run."""

from __future__ import annotations

import pprint
from collections.abc import Sequence

from chela_bench.records import AtlasRow

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

# kernel -> architecture -> [(configuration, why it cannot run; None if it can, or nobody knows)]
TABLE = '''

_CODE = '''

def prune(kernel=None, arch=None):
    """An early_config_prune for a kernel (None: all of the table) on an architecture (None: that of
    the current GPU)."""
    tables = list(TABLE.values()) if kernel is None else [TABLE[kernel]]

    def early_config_prune(configs, named_args, **kwargs):
        name = arch or current_arch()
        kept, dropped = [], []
        for config in configs:
            asked = {**config.kwargs, "num_warps": config.num_warps,
                     "num_stages": config.num_stages}
            known = [why for table in tables for row, why in table.get(name, ())
                     if set(config.kwargs) <= set(row)
                     and all(row[key] == asked[key] for key in row if key in asked)]
            if known and all(why is not None for why in known):
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
    for row in rows:
        known = table.setdefault(row.kernel, {}).setdefault(row.arch, [])
        config: dict[str, object] = dict(row.config)
        reason = None if row.fits or not row.known else row.reason or row.outcome
        at = next((i for i, (other, _) in enumerate(known) if other == config), None)
        if at is None:
            known.append((config, reason))
        elif reason is None:  # it runs with some of its flags, or may
            known[at] = (config, None)
    head = _HEAD.format(
        triton=rows[0].triton if rows else "none",
        dtype=" and ".join(dict.fromkeys(row.dtype for row in rows)),
        module=module,
    )
    return head + pprint.pformat(table, width=100, sort_dicts=False) + "\n" + _CODE
