"""Long kernels known beforehand: a spectrum in their place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from chela_bench.errors import ArgumentError
from chela_bench.kernels.short_long_conv import (
    kernel_spectrum,
    long_conv,
    short_long_conv,
)
from tests.convolutions import (
    DTYPES,
    WAYS,
    all_ways,
    drawn,
)


@all_ways
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_spectrum_replaces_the_kernels_transform(way, dtype):
    x, config = drawn(1, 30, 2, seed=1).to(DTYPES[dtype]), WAYS[way]
    short, long = [drawn(2, 3, seed=2)], drawn(2, 50, seed=3)
    spectrum = kernel_spectrum(long, 30, dtype=x.dtype, config=config)
    assert torch.equal(long_conv(x, long, spectrum=spectrum), long_conv(x, long, config=config))
    z = short_long_conv(x, short, long, spectrum=spectrum)
    assert torch.equal(z, short_long_conv(x, short, long, config=config))
    assert not spectrum.values.requires_grad


@all_ways
@pytest.mark.parametrize("T", [1, 30])
def test_two_spectra_replace_the_transforms_of_a_pair(way, T):
    x, config = drawn(1, T, 2, seed=1), WAYS[way]
    long, future = drawn(2, 50, seed=3), drawn(2, 29, seed=4)
    options = {"causal": False, "order": "parallel", "identity": False}
    pair = {
        "spectrum": kernel_spectrum(long, T, config=config),
        "spectrum_future": kernel_spectrum(F.pad(future, (1, 0)), T, config=config),
    }
    z = short_long_conv(x, [], long, long_kernel_future=future, config=config, **options)
    zeros = torch.zeros_like(long), torch.zeros_like(future)  # nothing is read of them
    found = short_long_conv(x, [], zeros[0], long_kernel_future=zeros[1], **options, **pair)
    assert torch.equal(found, z)


def test_rejects_half_a_pair_of_spectra():
    x, long = drawn(1, 30, 2, seed=1), drawn(2, 30, seed=2)
    spectrum = kernel_spectrum(long, 30)
    with pytest.raises(ArgumentError, match="got no spectrum and a long_kernel_future"):
        short_long_conv(
            x, [], long, causal=False, long_kernel_future=long, spectrum_future=spectrum
        )
    with pytest.raises(ArgumentError, match="got a spectrum and no long_kernel_future"):
        short_long_conv(x, [], long, spectrum=spectrum, spectrum_future=spectrum)
    other = kernel_spectrum(long, 30, config=WAYS["monarch"])
    with pytest.raises(ArgumentError, match=r"wanted a spectrum .* got .*monarch"):
        short_long_conv(
            x, [], long, causal=False, long_kernel_future=long,
            spectrum=spectrum, spectrum_future=other,
        )  # fmt: skip


def test_rejects_a_spectrum_of_another_call():
    x, long = drawn(2, 30, 3, seed=1), drawn(3, 50, seed=2)
    monarch = kernel_spectrum(long, 30, config=WAYS["monarch"])
    for other in [
        kernel_spectrum(long, 31),
        kernel_spectrum(long[:2], 30),
        kernel_spectrum(long.half(), 30),
        dataclasses.replace(monarch, N2=32),
        dataclasses.replace(monarch, method="direct", N2=0),
        dataclasses.replace(monarch, values=monarch.values.mT.contiguous().mT),
        dataclasses.replace(monarch, scale=None),
        dataclasses.replace(monarch, scale=monarch.scale[:1]),
    ]:
        with pytest.raises(
            ArgumentError, match=r"wanted a spectrum .*make it with kernel_spectrum"
        ):
            long_conv(x, long, spectrum=other)
    with pytest.raises(ArgumentError, match=r"factors with N2 = 16, got .*monarch with N2 = 16"):
        long_conv(x, long, spectrum=monarch, config=WAYS["factors"])
    assert torch.equal(
        long_conv(x, long, spectrum=monarch, config=WAYS["monarch"]),
        long_conv(x, long, spectrum=monarch),
    )
