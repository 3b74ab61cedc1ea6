"""Triton's interpreter without what it does over and over to the same end: more than half of the
time that small kernels take. Results keep their bits."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def without_repeats() -> Iterator[None]:
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _patches_found_once(interpreter))
        patch.setattr(interpreter, "_get_np_dtype", _dtypes_by_name(interpreter))
        builder = interpreter.interpreter_builder
        if not builder.options.debug:  # then the overflow is computed, and what is found dropped
            options = dataclasses.replace(builder.options, sanitize_overflow=False)
            patch.setattr(builder, "options", options)
        yield


def _patches_found_once(interpreter):
    """triton.language's functions are replaced by the interpreter's at every launch, and what to
    replace is looked for at every call of a helper, too, when all is replaced already."""
    import triton.language as tl

    find = interpreter._patch_lang
    known = {}

    def patch_lang(fn):
        modules = tuple(x for x in (tl, tl.core) if any(x is y for y in fn.__globals__.values()))
        if not any(tl.core.is_builtin(module.load) for module in modules):
            return None
        if modules not in known:
            scope = find(fn)
            first = {(id(obj), name): (obj, name, was) for obj, name, was in scope._changes[::-1]}
            known[modules] = [(*change, getattr(*change[:2])) for change in first.values()]
            return scope
        scope = interpreter._LangPatchScope()
        for obj, name, was, now in known[modules]:
            setattr(obj, name, now)
            scope._changes.append((obj, name, was))
        return scope

    return patch_lang


def _dtypes_by_name(interpreter):
    """Without a table of all of them at every operation."""
    import triton.language as tl

    find = interpreter._get_np_dtype
    known = {}

    def np_dtype(dtype):
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if dtype.name not in known:
            known[dtype.name] = find(dtype)
        return known[dtype.name]

    return np_dtype
