"""Triton's interpreter without what it does over and over to the same end: more than half of the
time that small kernels take. Results keep their bits."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def without_repeats() -> Iterator[None]:
    from triton.language import core
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _patches_found_once(interpreter))
        patch.setattr(interpreter, "_patch_attr", _patched_without_detours(interpreter))
        patch.setattr(core, "_unwrap_if_constexpr", _unwrapped_by_kind(core))
        patch.setattr(interpreter, "_get_np_dtype", _dtypes_by_name(interpreter))
        patch.setattr(core.tensor, "__init__", _tensors_of_shapes_known(core))
        patch.setattr(core.block_type, "__init__", _types_of_shapes_known(core))
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
    known, seen = {}, {}

    def patch_lang(fn):
        if fn not in seen:
            found = [x for x in (tl, tl.core) if any(x is y for y in fn.__globals__.values())]
            seen[fn] = tuple(found)
        modules = seen[fn]
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


def _patched_without_detours(interpreter):
    """A builtin's wrapper only looks whether `_semantic` is there."""
    semantic = interpreter.interpreter_semantic

    def patch_attr(obj, name, member, builder, scope):
        function = getattr(member, "__wrapped__", member)

        def new_member(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, new_member)

    return patch_attr


def _unwrapped_by_kind(core):
    """What most values are, first."""
    unwrap = core._unwrap_if_constexpr

    def unwrapped(value):
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind is int or kind is core.tensor else unwrap(value)

    return unwrapped


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


def _tensors_of_shapes_known(core):
    """Without a tuple of constants made anew for every tensor."""
    known = {}

    def init(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape.values) if type.is_block() else ()
        if sizes not in known:
            shape = core.tuple([core.constexpr(size) for size in sizes])
            known[sizes] = shape, core.constexpr(math.prod(sizes))
        self.shape, self.numel = known[sizes]

    return init


def _types_of_shapes_known(core):
    """Without the checks of a shape that has passed them, nor its name."""
    make = core.block_type.__init__
    known = {}

    def init(self, element_ty, shape):
        sizes = [size.value if isinstance(size, core.constexpr) else size for size in shape]
        if not all(type(size) is int for size in sizes):
            make(self, element_ty, shape)
            return
        key = (element_ty.name, *sizes)
        if key not in known:
            make(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = known[key]

    return init
