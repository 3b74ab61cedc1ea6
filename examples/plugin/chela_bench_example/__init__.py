"""What this distribution adds to chela-bench: data that names functions; nothing heavy imported."""

from chela_bench.bench.ops import Impl, Op

_HERE = "chela_bench_example.functions"

IMPLS = [
    Impl(
        "example_loop",
        f"{_HERE}:loop_over_chunks",
        "chunks of 64 tokens in a Python loop",
        axes=("CHUNK",),  # --axis CHUNK=32,64 arrives as a keyword
    )
]


def _bytes(shape, itemsize, direction):
    """Compulsory (read, written): x in, y out; backward, dy in, dx out."""
    x = shape["B"] * shape["T"] * shape["D"] * itemsize
    return {"fwd": (x, x), "bwd": (x, x), "fwdbwd": (2 * x, 2 * x)}[direction]


def _flops(shape, direction):
    once = 2 * shape["B"] * shape["T"] * shape["D"]  # an addition and a multiplication
    return 2 * once if direction == "fwdbwd" else once


OP = Op(
    name="running_mean",
    summary="y_t = (x_1 + ... + x_t) / t",
    dims=("B", "T", "D"),
    inputs=f"{_HERE}:inputs",
    oracle=f"{_HERE}:running_mean",  # given float64
    output_kind="tokens",
    roundings={"fwd": 2, "bwd": 2, "fwdbwd": 2},  # the sum and the quotient
    compulsory_bytes=_bytes,
    flops=_flops,
    impls=(Impl("cumsum", f"{_HERE}:running_mean", "torch.cumsum"),),
    shapes={"small": {"B": 1, "D": 64}, "medium": {"B": 1, "D": 1024}},
)
