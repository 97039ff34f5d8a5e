"""The grammar of the keys in an adapter's file: which module a tensor belongs to, and as what."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from pykernels.engine.shard import TensorInfo
from pykernels.engine.strict_json import FileError, shown

A, B, BIAS, MAGNITUDE, TOKENS = "A", "B", "bias", "magnitude", "tokens"

_PREFIX = re.compile(r"(?:(?:module|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.model\.(?:module\.)?")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Segments that trainers put into paths; nobody names a module like this."""

_PARTS: tuple[tuple[re.Pattern[str], str, bool], ...] = tuple(
    (re.compile(rf"(?P<module>.*)\.{tail}"), part, embedding)
    for tail, part, embedding in (
        (r"lora_A(?:\.default)?\.weight", A, False),
        (r"lora_B(?:\.default)?\.weight", B, False),
        (r"lora_B(?:\.default)?\.bias", BIAS, False),
        (r"lora_embedding_A(?:\.default)?", A, True),
        (r"lora_embedding_B(?:\.default)?", B, True),
        (r"lora_magnitude_vector(?:\.default)?(?:\.weight)?", MAGNITUDE, False),
        (r"token_adapter\.trainable_tokens_delta(?:\.default)?", TOKENS, False),
    )
)
_COPY = re.compile(r"(?P<module>.*?)(?:\.modules_to_save(?:\.default)?)?\.(?P<parameter>[^.]+)")
_FOREIGN = re.compile(r"\.(lora_|vera_|hada_|lokr_|ia3_|oft_|boft_|hra_|miss_|original_module|token_adapter)")


@dataclass
class Parts:
    """The tensors of one module; ``depth``: how many ``base_layer`` its path ended in (nested parameters)."""

    module: str
    depth: int
    embedding: bool = False
    tensors: dict[str, TensorInfo] = field(default_factory=dict)


@dataclass
class Keys:
    """An adapter's tensors by what they are. ``copies``: full tensors by the name they have in the base."""

    modules: list[Parts] = field(default_factory=list)
    copies: dict[str, TensorInfo] = field(default_factory=dict)


def sort_keys(infos: Iterable[TensorInfo]) -> Keys:
    """Sort the tensors of one file. Raises FileError for a key that means nothing, or what another means."""
    found: dict[tuple[str, int], Parts] = {}
    keys = Keys()
    for info in infos:
        path = _stripped(info)
        for pattern, part, embedding in _PARTS:
            if match := pattern.fullmatch(path):
                module, depth = _levels(match["module"])
                parts = found.setdefault((module, depth), Parts(module, depth))
                parts.embedding |= embedding
                _put(parts.tensors, part, info)
                break
        else:
            _put(keys.copies, _copied(path, info), info)
    keys.modules = list(found.values())
    return keys


def _stripped(info: TensorInfo) -> str:
    prefix = _PREFIX.match(info.name)
    if prefix is None:
        raise FileError(_says(info, "its key must begin with base_model.model., as PEFT writes it"))
    path = _WRAPPERS.sub("", info.name[prefix.end() :])
    if "\n" in path:
        raise FileError(_says(info, "a module's path has no line breaks"))
    return path


def _levels(module: str) -> tuple[str, int]:
    depth, end = 0, len(module)
    while module.endswith(".base_layer", 0, end):  # a name may have megabytes: it is cut once
        depth, end = depth + 1, end - len(".base_layer")
    return module[:end], depth


def _copied(path: str, info: TensorInfo) -> str:
    """The base's name of a full copy: of a module to save, of a base layer, of a bias."""
    match = _COPY.fullmatch(path)
    if match is None or _FOREIGN.search(f".{path}"):
        raise FileError(_says(info, "no tensor of a LoRA adapter that is known here"))
    return f"{_levels(match['module'])[0]}.{match['parameter']}"


def _put(where: dict[str, TensorInfo], key: str, info: TensorInfo) -> None:
    if key in where:
        raise FileError(_says(info, f"means the same tensor as {shown(where[key].name)}"))
    where[key] = info


def _says(info: TensorInfo, what: str) -> str:
    return f"{shown(info.file, 300)}: tensor {shown(info.name)}: {what}"
