"""What models say on an H100 that is not there, and what is launched on it: cases in on stdin, a
line of JSON for each out. In a process of its own, which stands in for one GPU."""

import json
import math
import sys

from torch.profiler import ProfilerActivity, profile
from triton.backends.compiler import GPUTarget

from chela_bench.bench.cases import Case
from chela_bench.bench.launches import Recorder
from chela_bench.bench.load import load
from chela_bench.bench.modelled import modelled_bytes, modelled_launches
from chela_bench.bench.registry import get_op

L2_BYTES = 50 << 20
PRODUCTS = "aten::mm", "aten::addmm", "aten::addmm_"


def main() -> None:
    recorder = Recorder(GPUTarget("cuda", 90, 32), 132)
    for line in sys.stdin:
        case = Case.model_validate_json(line)
        op = get_op(case.op)
        impl = op.impl(case.impl)
        steps = load(str(impl.hbm_bytes))(case.shape, case.config, itemsize=2)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            launched = recorder.launches(case)
        said = {
            "launched": sorted({str(one.source.name) for one in launched}),
            "products": [
                2 * sum(math.prod(size) for size in event.input_shapes if len(size) == 2)
                for event in seen.events()
                if event.name in PRODUCTS and getattr(event.cpu_parent, "name", "") not in PRODUCTS
            ],  # bytes that each one reads, but for a bias
            "reads": [(step.kernel, sum(step.reads.values())) for step in steps],
            "launches": modelled_launches(case, impl, L2_BYTES),
            "without": modelled_launches(case, impl, None),
            "total": modelled_bytes(case, op, impl, L2_BYTES).model_bytes,
        }
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
