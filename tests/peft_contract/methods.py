"""Our methods as PEFT's tests see them: one entry each, with its cases and what it leaves out and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gaintune.tuners.disel import DiselConfig
from gaintune.tuners.gain import GainConfig
from gaintune.tuners.gainlora import GainloraConfig
from gaintune.tuners.svft import SvftConfig

Case = tuple[str, str, dict[str, Any]]
CASES: tuple[Case, ...] = (
    ("Linear, name", "MLP", {"target_modules": "lin0"}),
    ("Linear, list", "MLP", {"target_modules": ["lin0"]}),
    ("Linear, last layer", "MLP", {"target_modules": ["lin1"]}),
    ("Linear, two layers", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Linear, all-linear", "MLP", {"target_modules": "all-linear"}),
    ("Linear, module saved", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Linear, excluded", "MLP", {"target_modules": ["lin0", "lin1"], "modules_to_save": ["lin1"]}),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"]}),
    ("Conv1D and Linear", "EmbConv1D", {"target_modules": ["conv1d", "lin0"]}),
    ("Conv1D, module saved", "EmbConv1D", {"target_modules": ["conv1d"], "modules_to_save": ["lin0"]}),
    ("Linear behind Conv1D", "EmbConv1D", {"target_modules": ["lin0"]}),
)


@dataclass(frozen=True)
class Method:
    """One of our methods.

    Attributes:
        name: ending of the names of its test classes.
        config: its configuration class.
        random: fields that make it start away from the base.
        cases: name, upstream's model, and fields of the configuration.
        left_out: upstream test -> why it is not run.
        narrowed: upstream test -> parameter -> the values that are run, and why not the others.
        mergeable: whether it can be merged into the base; where not, tests that end by merging are skipped there.
    """

    name: str
    config: type
    random: dict[str, Any]
    cases: tuple[Case, ...]
    left_out: dict[str, str]
    narrowed: dict[str, dict[str, tuple[list[Any], str]]] = field(default_factory=dict)
    mergeable: bool = True

    def rows(self) -> list[tuple[Any, ...]]:
        """Rows for upstream's TEST_CASES."""
        return [(name, model, self.config, fields) for name, model, fields in self.cases]

    def pairs(self) -> list[tuple[Any, ...]]:
        """Rows for upstream's tests of two active adapters."""
        one, other = ({"target_modules": [name], **self.random} for name in ("lin0", "lin1"))
        kind = self.name.lower()
        return [("Same", kind, self.config, one, one), ("Different", kind, self.config, one, other)]


_LAYERS = {
    "test_mixed_adapter_batches_lora_conv2d": "adapts a convolution, refused",
    "test_mixed_adapter_batches_mha_raises": "adapts nn.MultiheadAttention, refused",
    "test_mixed_adapter_batches_lora_opt_timing": "times a model from the Hub on a GPU",
    "test_save_pretrained_targeting_lora_to_embedding_layer": "adapts an embedding, refused",
    "test_save_pretrained_targeting_lora_to_embedding_layer_non_transformers": "adapts an embedding, refused",
    "test_default_target_modules_list_of_str": "patches the table of another method",
    "test_default_target_modules_str": "patches the table of another method",
    "test_save_load_roundtrip_fsdp_wrapped_learnable_bias": "no bias setting, or refused (test_tuner_refusals.py)",
}
_DEFAULT = "expects no default; DISeL adapts every linear layer unless it is given others"
_MERGING = "merges, which is refused (tests/tuners/test_tuner_refusals.py)"

_MERGES = (
    "test_merge_layers",
    "test_merge_layers_fp16",
    "test_merge_layers_is_idempotent",
    "test_merge_layers_is_deterministic_in_train_mode",
    "test_safe_merge",
    "test_disable_adapters_with_merging",
    "test_delete_merged_adapter_raises_without_mutation",
    "test_delete_merged_adapter_only_rejects_the_merged_one",
    "test_multiple_active_adapters_merge_and_unmerge",
    "test_merge_layers_multi",
    "test_sequential_merge_matches_batch_merge",
    "test_unmerge_after_sequential_merge_restores_base",
    "test_mixed_adapter_batches_merged_raises",
)
_GATED_CASES: tuple[Case, ...] = (
    ("Linear, low-rank gate", "MLP", {"target_modules": ["lin0"], "gate_rank": 2}),
    ("Linear, Gated LoRA", "MLP", {"target_modules": ["lin0"], "gate_kind": "relu"}),
    ("Linear, rslora", "MLP", {"target_modules": ["lin0"], "use_rslora": True, "r": 4, "lora_dropout": 0.1}),
    ("Linear, patterns", "MLP", {"target_modules": ["lin0", "lin1"], "rank_pattern": {"lin1": 2}}),
    ("Conv1D, low-rank gate", "EmbConv1D", {"target_modules": ["conv1d"], "gate_rank": 2}),
)

# gates that are nearly shut move less in upstream's three steps than its tests can see
_HALF_OPEN = tuple((name, model, {**given, "gate_bias_init": 0.0}) for name, model, given in (*CASES, *_GATED_CASES))
_SATURATED = ("Linear behind Conv1D", "Linear, patterns")

_ALWAYS_WIDE = {
    "test_adapter_dtype_autocast": {
        "autocast_adapter_dtype": (
            [True],
            "expects the base's dtype; gains and gates are always float32 (tests/tuners/test_tuner_saving.py)",
        )
    }
}

_ONE_A_BATCH = {
    **dict.fromkeys(
        [
            "test_mixed_adapter_batches_different_target_layers",
            "test_mixed_adapter_batches_length_mismatch_raises",
            "test_mixed_adapter_batches_lora_conv1d_emb",
            "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save",
            "test_mixed_adapter_batches_lora_wrong_adapter_name_raises",
            "test_mixed_adapter_batches_merged_raises",
            "test_mixed_adapter_batches_mlp",
            "test_mixed_adapter_batches_multiple_modules_to_save",
            "test_mixed_adapter_batches_partly_overlapping_target_layers",
            "test_mixed_adapter_batches_training_mode_raises",
            "test_mixed_adapter_batches_unsupported_layer_raises",
        ],
        "mixes adapters in a batch, refused (test_svft.py, test_gainlora.py)",
    ),
    **dict.fromkeys(
        [
            "test_default_target_modules_not_set_raises",
            "test_default_target_modules_not_set_model_type_set_raises",
        ],
        "expects no default; every linear layer is adapted unless others are given",
    ),
}
_ALL_TRAIN = (
    "test_loading_model_requires_grad_set_correctly",
    "test_loading_model_with_modules_to_save_requires_grad_set_correctly",
)

METHODS = (
    Method("Gain", GainConfig, {"init_weights": False}, CASES, _LAYERS, _ALWAYS_WIDE),
    Method(
        "Disel",
        DiselConfig,
        {"init_lora_weights": False},
        _HALF_OPEN,
        {
            **_LAYERS,
            **dict.fromkeys(_MERGES, _MERGING),
            "test_default_target_modules_not_set_raises": _DEFAULT,
            "test_default_target_modules_not_set_model_type_set_raises": _DEFAULT,
            "test_adding_multiple_adapters_with_bias_raises": "trains biases, refused (test_tuner_refusals.py)",
        },
        {
            **_ALWAYS_WIDE,
            "test_only_params_are_updated": {
                "test_name, model_id, config_cls, config_kwargs": (
                    [(name, model, DiselConfig, given) for name, model, given in _HALF_OPEN if name not in _SATURATED],
                    f"upstream's inputs (up to 89) and rate of 0.5 saturate the gates of {' and '.join(_SATURATED)!r}; "
                    "see test_only_the_adapter_is_updated_and_all_of_it in test_tuner_adapters.py",
                )
            },
        },
        mergeable=False,
    ),
    Method("Svft", SvftConfig, {"init_weights": False}, CASES, {**_LAYERS, **_ONE_A_BATCH}, _ALWAYS_WIDE),
    Method(
        "Gainlora",
        GainloraConfig,
        {"init_weights": False},
        CASES,
        {
            **_LAYERS,
            **_ONE_A_BATCH,
            **dict.fromkeys(_MERGES, _MERGING),
            **dict.fromkeys(_ALL_TRAIN, "expects all of an adapter to train; earlier branches are frozen"),
        },
        _ALWAYS_WIDE,
        mergeable=False,
    ),
)
