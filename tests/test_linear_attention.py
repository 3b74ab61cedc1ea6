"""The four forms of reference/linear_attention.py are one function, and it is the right one."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from chela_bench.errors import ArgumentError
from chela_bench.reference.linear_attention import (
    chunked,
    linear_attention,
    linear_attention_step,
    naive_cumsum,
    quadratic,
    recurrent,
)

FORMS = {
    "naive_cumsum": naive_cumsum,
    "quadratic": quadratic,
    "recurrent": recurrent,
    "chunked": chunked,
    "chunked-C7": partial(chunked, chunk_size=7),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


def inputs(B, T, H, K, V, *, dtype=torch.float64, N=None):
    generator = torch.Generator().manual_seed(T)
    shapes = (B, T, H, K), (B, T, H, K), (B, T, H, V), (B if N is None else N, H, K, V)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def defined(q, k, v, state, *, scale, causal):
    """The definition by plain loops over everything but V."""
    B, T, H, K = q.shape
    o, final = torch.zeros_like(v), state.clone()
    for b in range(B):
        for h in range(H):
            for t in range(T):
                for i in range(K):
                    final[b, h, i] += k[b, t, h, i] * v[b, t, h]
                if causal:
                    o[b, t, h] = scale * sum(q[b, t, h, i] * final[b, h, i] for i in range(K))
            if not causal:
                for t in range(T):
                    o[b, t, h] = scale * sum(q[b, t, h, i] * final[b, h, i] for i in range(K))
    return o, final


@each_form
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
def test_matches_the_definition(form, causal):
    q, k, v, state = inputs(2, 9, 2, 3, 4)
    o, final = form(q, k, v, scale=0.7, initial_state=state, output_final_state=True, causal=causal)
    o_defined, final_defined = defined(q, k, v, state, scale=0.7, causal=causal)
    torch.testing.assert_close(o, o_defined, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, final_defined, rtol=1e-12, atol=1e-12)


@each_form
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("T", [0, 1, 63, 64, 65, 130])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "no-state"])
def test_forms_agree(form, T, causal, with_state):
    q, k, v, state = inputs(2, T, 3, 5, 6)
    options = {
        "initial_state": state if with_state else None,
        "output_final_state": True,
        "causal": causal,
    }
    o, final = form(q, k, v, **options)
    o_expected, final_expected = recurrent(q, k, v, **options)
    assert o.shape == v.shape and final.shape == state.shape
    torch.testing.assert_close(o, o_expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, final_expected, rtol=1e-12, atol=1e-12)


@each_form
def test_no_tokens_return_the_initial_state(form):
    q, k, v, state = inputs(2, 0, 3, 5, 6)
    _, final = form(q, k, v, initial_state=state, output_final_state=True)
    assert torch.equal(final, state)
    assert form(q, k, v)[1] is None


@each_form
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_packed_sequences_do_not_see_each_other(form, causal, integer):
    lengths = [0, 1, 70, 0, 59, 0]
    q, k, v, state = inputs(1, sum(lengths), 2, 5, 6, N=len(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integer)
    o, final = form(
        q,
        k,
        v,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
        causal=causal,
    )
    for n, (start, end) in enumerate(pairwise(cu_seqlens)):
        alone = (x[:, start:end] for x in (q, k, v))
        o_n, final_n = recurrent(
            *alone, initial_state=state[n : n + 1], output_final_state=True, causal=causal
        )
        torch.testing.assert_close(o[:, start:end], o_n, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final[n : n + 1], final_n, rtol=1e-12, atol=1e-12)


@each_form
def test_pieces_with_state_handed_over_equal_one_call(form):
    q, k, v, state = inputs(2, 100, 2, 5, 6)
    o, final = form(q, k, v, initial_state=state, output_final_state=True)
    pieces = []
    for start, end in [(0, 1), (1, 65), (65, 65), (65, 100)]:
        piece = (x[:, start:end] for x in (q, k, v))
        o_piece, state = form(*piece, initial_state=state, output_final_state=True)
        pieces.append(o_piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


def test_steps_equal_one_call():
    q, k, v, state = inputs(2, 20, 2, 5, 6)
    o, final = recurrent(q, k, v, initial_state=state, output_final_state=True)
    place = state.data_ptr()
    steps = [linear_attention_step(q[:, t], k[:, t], v[:, t], state) for t in range(20)]
    torch.testing.assert_close(torch.stack(steps, dim=1), o, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)
    assert state.data_ptr() == place


@each_form
@pytest.mark.parametrize("t", [0, 1, 63, 64, 99])
def test_the_past_is_blind_to_the_future(form, t):
    q, k, v, _ = inputs(1, 100, 2, 5, 6)
    o, _ = form(q, k, v)
    for x in (q, k, v):
        x[:, t:] = torch.randn_like(x[:, t:]) * 100
    o_changed, _ = form(q, k, v)
    assert torch.equal(o[:, :t], o_changed[:, :t])
    assert not torch.equal(o[:, t], o_changed[:, t])


@each_form
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "two-sided"])
def test_gradients(form, causal):
    q, k, v, state = (x.requires_grad_() for x in inputs(1, 5, 2, 2, 3))

    def call(q, k, v, state):
        return form(q, k, v, initial_state=state, output_final_state=True, causal=causal)

    form = partial(form, **({"chunk_size": 2} if form is chunked else {}))
    assert torch.autograd.gradcheck(call, (q, k, v, state))
    assert torch.autograd.gradgradcheck(call, (q, k, v, state))


def test_gradients_of_packed_sequences():
    q, k, v, state = (x.requires_grad_() for x in inputs(1, 5, 1, 2, 2, N=3))
    cu_seqlens = torch.tensor([0, 2, 2, 5])

    def call(q, k, v, state):
        return chunked(q, k, v, initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, (q, k, v, state))


def test_the_dtype_rule():
    q, k, v, state = inputs(1, 70, 2, 16, 16, dtype=torch.bfloat16)
    o, final = linear_attention(q, k, v, initial_state=state, output_final_state=True)
    assert o.dtype == final.dtype == torch.float32
    exact, _ = linear_attention(q.double(), k.double(), v.double(), initial_state=state.double())
    assert exact.dtype == torch.float64
    assert (o - exact).norm() / exact.norm() < 1e-6  # float32 throughout, though given bfloat16


def test_compiles_without_a_graph_break():
    q, k, v, state = inputs(1, 130, 2, 8, 8, dtype=torch.float32)
    compiled = torch.compile(chunked, fullgraph=True, backend="aot_eager")
    o, final = compiled(q, k, v, initial_state=state, output_final_state=True)
    o_eager, final_eager = chunked(q, k, v, initial_state=state, output_final_state=True)
    torch.testing.assert_close((o, final), (o_eager, final_eager))


BAD_CU_SEQLENS = {
    "starts late": [1, 4],
    "ends early": [0, 3],
    "falls": [0, 3, 2, 4],
    "empty": [],
    "floats": [0.0, 4.0],
    "nested": [[0, 4]],
}


@each_form
@pytest.mark.parametrize("bad", BAD_CU_SEQLENS.values(), ids=BAD_CU_SEQLENS.keys())
def test_rejects_bad_cu_seqlens(form, bad):
    q, k, v, _ = inputs(1, 4, 1, 2, 2)
    with pytest.raises(ArgumentError, match=r"wanted cu_seqlens .* got .*; pass"):
        form(q, k, v, cu_seqlens=torch.tensor(bad, dtype=None if bad else torch.int64))


@each_form
def test_rejects_what_does_not_fit(form):
    q, k, v, state = inputs(2, 4, 1, 2, 3)
    for bad in [
        lambda: form(q, k[:, :3], v),
        lambda: form(q, k, v[:, :, 0]),
        lambda: form(q[0], k[0], v[0]),
        lambda: form(q.long(), k, v),
        lambda: form(q, k, v, initial_state=state[:1]),
        lambda: form(q, k, v, cu_seqlens=torch.tensor([0, 4])),
    ]:
        with pytest.raises(ArgumentError, match=r"wanted .* got .*;"):
            bad()


def test_rejects_a_chunk_of_no_tokens():
    q, k, v, _ = inputs(1, 4, 1, 2, 2)
    with pytest.raises(ArgumentError, match="chunk_size"):
        chunked(q, k, v, chunk_size=0)


def test_step_rejects_a_state_that_it_cannot_update():
    q, k, v, state = inputs(2, 1, 1, 2, 3, dtype=torch.float32)
    q, k, v = (x[:, 0] for x in (q, k, v))
    for bad in [state.bfloat16(), state[:1], state.mT]:
        with pytest.raises(ArgumentError, match="in place"):
            linear_attention_step(q, k, v, bad)
    with pytest.raises(ArgumentError, match="no T axis"):
        linear_attention_step(q[:, None], k[:, None], v[:, None], state)
