"""A model on disk: config.json, what it is built from, and model.safetensors, its parameters.

model.safetensors carries the text of config.json in its metadata. Weights are read with the config
they were saved with, or refused: their shapes alone would not tell order="serial" from "parallel".
A save writes both files aside, flushes them to the disk and moves them into place one after the
other, each at once. A killed save may leave a folder .saving-*, which nothing needs. Killed between
the two moves it leaves new weights beside an old config.json, which is refused as any other that
does not fit, unless both say the same.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from chela_bench.errors import ArgumentError, EnvironmentProblem

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FREE = {"implementation", "dropout"}  # may differ between both files
DTYPES = {"F64", "F32", "F16", "BF16"}  # safetensors' names

Model = TypeVar("Model", bound=nn.Module)


def save_model(
    folder: str | Path, document: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> None:
    """Writes both files into the folder. document: config.json's content. Raises EnvironmentProblem
    if that fails; what was there stays."""
    safetensors = _safetensors()
    folder, text = Path(folder), json.dumps(document, indent=2) + "\n"
    tensors = {name: x.detach().contiguous() for name, x in parameters.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as aside:
            config, weights = Path(aside, CONFIG), Path(aside, WEIGHTS)
            config.write_text(text, encoding="utf-8")
            safetensors.torch.save_file(tensors, weights, metadata={"format": "pt", CONFIG: text})
            for path in (config, weights):
                _flush(path)
            weights.replace(folder / WEIGHTS)
            config.replace(folder / CONFIG)
        _flush(folder)
    except (OSError, safetensors.SafetensorError) as error:
        raise EnvironmentProblem(
            f"could not save the model in {folder}: {error}; a model that was there is as it was, "
            "make room or pass another folder"
        ) from error


def load_model(
    folder: str | Path,
    architecture: str,
    build: Callable[[dict[str, Any]], Model],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> Model:
    """The model that build makes of config.json, with the parameters of model.safetensors. Raises
    ArgumentError, naming the file, if one is missing or damaged or does not fit."""
    safetensors = _safetensors()
    if dtype is not None and not dtype.is_floating_point:
        raise ArgumentError(f"wanted a floating-point dtype, got {dtype}; torch.float32 is one")
    config, weights = Path(folder, CONFIG), Path(folder, WEIGHTS)
    document = _read_config(config)
    if document.get("architecture") != architecture:
        raise ArgumentError(
            f"wanted the architecture {architecture} in {config}, got "
            f"{document.get('architecture')!r}; load it by the class it was saved from"
        )
    options = {name: value for name, value in document.items() if name != "architecture"}
    try:
        with torch.device("meta"):  # parameters come from the file
            model = build(options)
    except ArgumentError as error:
        raise ArgumentError(f"{config}: {error}") from error
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            _check_config(file.metadata() or {}, document, config, weights)
            _check_parameters(file, model.state_dict(), config, weights)
            found = {
                name: file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
                for name in file.keys()  # noqa: SIM118
            }
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(weights, error) from error
    model.load_state_dict(found, assign=True)
    return model


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise EnvironmentProblem(
            "saving and loading models needs safetensors, which is not installed; "
            "pip install -e '.[models]' in the checkout"
        ) from error
    return safetensors


def _flush(path: Path) -> None:
    """On the disk, not only in the system's cache."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    return _parse(text, path)


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(document, dict):
        raise _unreadable(path, f"wanted an object, got a {type(document).__name__}")
    return document


def _unreadable(path: Path, why: object) -> ArgumentError:
    return ArgumentError(
        f"could not read {path}: {why}; pass a folder that save_pretrained wrote, or save again"
    )


def _check_config(
    metadata: Mapping[str, str], document: Mapping[str, Any], config: Path, weights: Path
) -> None:
    """Weights of another tool say nothing of their config: those may pass."""
    if CONFIG not in metadata:
        return
    saved = _parse(metadata[CONFIG], weights)
    names = sorted((set(saved) | set(document)) - FREE)
    if differing := [name for name in names if saved.get(name) != document.get(name)]:
        was = ", ".join(f"{name} = {json.dumps(saved.get(name))}" for name in differing)
        raise ArgumentError(
            f"{config} is not of the save that {weights} is of: there {was}; set it so in "
            f"{CONFIG}, or save again"
        )


def _check_parameters(file: Any, wanted: Mapping[str, Tensor], config: Path, weights: Path) -> None:
    found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    shared = [name for name in wanted if name in found]
    shapes = {name: found[name].get_shape() for name in shared}
    kinds = {name: found[name].get_dtype() for name in shared}
    wrong = [
        *(f"{name} is missing" for name in wanted if name not in found),
        *(f"{name} is too much" for name in found if name not in wanted),
        *(
            f"{name} is {shapes[name]}, wanted {list(wanted[name].shape)}"
            for name in shared
            if shapes[name] != list(wanted[name].shape)
        ),
        *(
            f"{name} is of {kinds[name]}, wanted floating-point numbers"
            for name in shared
            if kinds[name] not in DTYPES
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArgumentError(
            f"{weights} does not fit {config}: {', '.join(wrong[:3])}{more}; both are of one save"
        )
