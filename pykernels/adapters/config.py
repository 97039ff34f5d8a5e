"""adapter_config.json, read strictly: what changes the meaning of an adapter is honoured or refused."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pykernels.adapters.patterns import Patterns, Value
from pykernels.engine.header import INT64_MAX
from pykernels.engine.shard import inside, open_regular, read_exactly
from pykernels.engine.strict_json import FileError, shown, strict_json

CONFIG = "adapter_config.json"
_MAX_CONFIG = 10_000_000

HONOURED = (
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out", "bias",
    "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "peft_type",
    "init_lora_weights", "ensure_weight_tying",
)  # fmt: skip
WITHOUT_EFFECT = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
)  # fmt: skip
"""Which modules were trained and how: the tensors say the first, and the second is over."""

VARIANTS: Mapping[str, str] = {
    "use_qalora": "QALoRA's A acts on pooled inputs, which no change of the weight can stand for",
    "alora_invocation_tokens": "an activated LoRA acts on the tokens after its invocation only",
    "layer_replication": "replicated layers share the base's weights",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "Arrow routes every token to other adapters",
    "velora_config": "VeLoRA is not known here",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA truncates the base's singular values",
    "megatron_config": "Megatron's parallel layers name and cut their tensors otherwise",
}
"""Switches of PEFT 0.21.2 that make an adapter something else than W + s B A, and why they are refused."""

LARGEST = 2.0**127
"""Of alphas and scalings: float32 holds them."""

STARTS = ("gaussian", "eva", "orthogonal")
"""Initialisations by name that leave the base as it is."""
RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings of initialisations that take a part out of the base: the adapter belongs to what they left."""


@dataclass(frozen=True)
class AdapterConfig:
    """Keys that decide what a LoRA adapter of PEFT computes, in PEFT's words. ``said``: its origin."""

    path: Path
    r: int
    lora_alpha: float
    ranks: Patterns[int]
    alphas: Patterns[float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    token_indices: dict[str, tuple[int, ...]]
    target_parameters: tuple[str, ...]
    tied: bool
    said: Mapping[str, str | None]

    def rows(self, module: str) -> tuple[int, ...] | None:
        """The trainable tokens of an embedding."""
        for name, rows in self.token_indices.items():
            if name and f".{module}".endswith(f".{name}"):
                return rows
        return self.token_indices.get("")

    def rank(self, module: str) -> int:
        """The rank that the config gives a module (its path below ``base_model.model``)."""
        return self.ranks.find(module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """alpha / r, with rank-stabilised LoRA alpha / sqrt(r) (Kalajdzievski, 2023)."""
        alpha = self.alphas.find(module, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(adapter: Path) -> AdapterConfig:
    """Read ``adapter``'s adapter_config.json. Raises FileError naming the file, the key and its value."""
    path = adapter / CONFIG
    name = shown(path, 300)
    if not os.path.lexists(path):
        raise FileError(f"{shown(adapter, 300)}: not a PEFT adapter, it holds no {CONFIG}")
    if not inside(adapter, path):
        raise FileError(f"{name}: leads out of the adapter's directory")
    with open_regular(path) as handle:
        size = os.fstat(handle).st_size
        if size > _MAX_CONFIG:
            raise FileError(f"{name}: {size} bytes, the limit is {_MAX_CONFIG}")
        found = strict_json(read_exactly(name, handle, 0, size), name)
    if not isinstance(found, dict):
        raise FileError(f"{name}: must hold a JSON object")
    return _Reader(path, found).read()


class _Reader:
    """Takes one config apart; every refusal names the file and the key."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self._path = path
        self._found = found

    def read(self) -> AdapterConfig:
        """The config, or FileError."""
        kind = self._found.get("peft_type")
        if kind != "LORA":
            self._refuse("peft_type", kind, "only LORA adapters can be merged")
        self._refuse_variants()
        return AdapterConfig(
            path=self._path,
            r=self._rank("r", self._found.get("r", 8)),
            lora_alpha=self._number("lora_alpha", self._found.get("lora_alpha", 8)),
            ranks=self._pattern("rank_pattern", self._rank),
            alphas=self._pattern("alpha_pattern", self._number),
            use_rslora=self._flag("use_rslora"),
            use_dora=self._flag("use_dora"),
            fan_in_fan_out=self._flag("fan_in_fan_out"),
            bias=self._bias(),
            lora_bias=self._flag("lora_bias"),
            modules_to_save=self._names("modules_to_save"),
            token_indices=self._tokens(),
            target_parameters=self._names("target_parameters"),
            tied=self._flag("ensure_weight_tying"),
            said={key: self._text(key) for key in ("base_model_name_or_path", "task_type")},
        )

    def _refuse(self, key: str, value: Any, why: str) -> NoReturn:
        raise FileError(f"{shown(self._path, 300)}: {key}: {shown(value)}: {why}")

    def _refuse_variants(self) -> None:
        for key, value in self._found.items():
            empty = value is None or value is False or value == [] or (value == {} and key not in VARIANTS)
            if empty or key in HONOURED or key in WITHOUT_EFFECT:
                continue  # {} asks for a variant with its default settings
            why = VARIANTS.get(
                key, "not a switch of PEFT 0.21.2, and it may change what the adapter computes"
            )
            self._refuse(key, value, why)
        start = self._found.get("init_lora_weights", True)
        if str(start).lower() == "mica":
            self._refuse("init_lora_weights", start, "MiCA is a variant of its own")
        if isinstance(start, str) and start.lower().startswith(RESIDUAL):
            why = (
                "the adapter belongs to what this initialisation left of the base; save it with "
                "path_initial_model_for_weight_conversion, which makes it one of the base itself"
            )
            self._refuse("init_lora_weights", start, why)
        if not isinstance(start, bool | None) and str(start).lower() not in STARTS:
            self._refuse(
                "init_lora_weights", start, "not known here, and it may have taken a part out of the base"
            )

    def _flag(self, key: str) -> bool:
        value = self._found.get(key, False)
        if not isinstance(value, bool | None):
            self._refuse(key, value, "must be true or false")
        return bool(value)

    def _text(self, key: str) -> str | None:
        value = self._found.get(key)
        if not isinstance(value, str | None):
            self._refuse(key, value, "must be text")
        return value

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            self._refuse(key, value, f"must be a finite number, of at most {LARGEST:.3g}")
        return float(value)

    def _rank(self, key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= INT64_MAX:
            self._refuse(key, value, "a rank must be an integer of at least 1, and of 64 bits")
        return int(value)

    def _pattern(self, key: str, read: Callable[[str, Any], Value]) -> Patterns[Value]:
        value = self._found.get(key) or {}
        if not isinstance(value, dict):
            self._refuse(key, value, "must be an object")
        where = f"{shown(self._path, 300)}: {key}"
        return Patterns(where, {pattern: read(key, number) for pattern, number in value.items()})

    def _bias(self) -> str:
        value = self._found.get("bias", "none")
        if value not in ("none", "all", "lora_only"):
            self._refuse("bias", value, "must be none, all or lora_only")
        return str(value)

    def _names(self, key: str) -> tuple[str, ...]:
        value = self._found.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self._refuse(key, value, "must be a list of names")
        return tuple(value)

    def _tokens(self) -> dict[str, tuple[int, ...]]:
        """Rows by module; "" stands for the embedding, which a plain list means."""
        key = "trainable_token_indices"
        value = self._found.get(key) or {}
        named = value if isinstance(value, dict) else {"": value}
        for rows in named.values():
            good = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
            if not good or len(set(rows)) != len(rows):
                self._refuse(key, value, "must be lists of different rows")
        return {name: tuple(rows) for name, rows in named.items()}
