"""For every option: a setting under which nothing reads it, and one under which it changes a run.

`tests/config/test_effects.py` walks these tables. A new field needs an entry in ACTS, or in the ELSEWHERE of
`tests/option_tests.py`, and in IDLE where it acts only beside others.
"""

from tokenkit.commands.ablate import AblateConfig
from tokenkit.commands.align import AlignOptions
from tokenkit.commands.bits_per_byte import BitsPerByteConfig
from tokenkit.commands.draft import DraftConfig
from tokenkit.commands.eval import EvalConfig
from tokenkit.commands.eval_ensemble import EvalEnsembleConfig
from tokenkit.commands.export import ExportConfig
from tokenkit.commands.merge_lora import MergeLoraConfig
from tokenkit.commands.mined_mapping import MinedMappingConfig
from tokenkit.commands.pair_stats import PairStatsConfig
from tokenkit.commands.report import ReportConfig
from tokenkit.commands.zett import ZettConfig
from tokenkit.config import TrainConfig
from tokenkit.config.hypernet import TrainHypernetConfig
from tokenkit.config.pretrain import PretrainConfig

NEEDED = {
    TrainConfig: {
        "student.pretrained_model_name_or_path": "org/model", "target_tokenizer_name": "byte",
        "data.dataset_name": "text.txt",
    },
    ZettConfig: {
        "model.pretrained_model_name_or_path": "org/model", "target_tokenizer_name": "byte", "output": "out",
    },
    PairStatsConfig: {
        "teacher_tokenizer_name": "a", "target_tokenizer_name": "b", "output": "out",
        "data.dataset_name": "text.txt",
    },
    MinedMappingConfig: {"teacher_tokenizer_name": "a", "target_tokenizer_name": "b", "output": "out"},
    TrainHypernetConfig: {
        "model.pretrained_model_name_or_path": "org/model", "data.dataset_name": "text.txt", "output": "out",
    },
    AlignOptions: {"student": "a", "teacher": "b"},
    EvalConfig: {"models": ["org/model"], "tasks": ["piqa"], "output": "out"},
    ExportConfig: {"checkpoint_path": "run", "output": "out"},
    BitsPerByteConfig: {"text": "text.txt", "models": ["org/model"]},
    MergeLoraConfig: {"base_model": "org/model", "lora_model": ".", "output": "out"},
    ReportConfig: {"runs": ["."], "output": "out.html"},
    AblateConfig: {"base_config": "base.yaml", "axes": ["data_mix"]},
    DraftConfig: {"target_model": "org/a", "draft": "org/b", "text": "text.txt"},
    EvalEnsembleConfig: {"models": ["org/a", "org/b"], "prompts": ["x"]},
    PretrainConfig: {},
}  # fmt: skip

GOLD = {"losses": ["baseline_gold"]}
POSITIONAL = {**GOLD, "baseline.gold.use_extended_uld": False}
HYBRID = {**GOLD, "baseline.gold.uld_use_hybrid_loss": True}
SHARES = {f"baseline.gold.uld_hybrid_{name}_weight": 0.5 for name in ("matched", "unmatched")}
HERE = object()
"""Stands for a file that the fixture made: its name is that of the option."""

CLM, ULD, LOCAL = {"losses": ["clm"]}, {"losses": ["baseline_uld"]}, "."
NO_HELDOUT = {"data.heldout.fraction": 0.0}
ASKED = {"eval.tasks": ["piqa"]}
NAMED = {"data.dataset_name": None, "data.datasets": [{"path": "a.txt"}]}
IDENTITY = {"hypernet.architecture": "identity"}
IDLE = {
    TrainConfig: {
        "student.revision": ("main", {"student.pretrained_model_name_or_path": LOCAL}),
        "teacher.revision": ("main", {"teacher.pretrained_model_name_or_path": LOCAL}),
        "pad_to_multiple_of": (
            8, {"target_tokenizer_name": None, "teacher.pretrained_model_name_or_path": LOCAL},
        ),
        "special_tokens_mode": ("ignore", CLM), "baseline.exact_sort": (True, CLM),
        "baseline.uld_extended": (True, CLM),
        "baseline.gold.beta": (0.1, GOLD), "baseline.gold.uld_student_temperature": (2.0, CLM),
        "n_model_parallel": (2, {}), "eval.tasks": (["arc"], {"skip_lm_eval": True}), "eval.limit": (1, {}),
        "eval.add_bos": (False, {}), "eval.num_fewshot": (1, {}), "eval.batch_size": (2, {}),
        "eval.max_length": (9, {}), "eval.chat_template_mode": ("surround_instruct", {}),
        "eval.task_data": (LOCAL, {}), "eval.temperature": (0.5, ASKED), "eval.num_beams": (2, ASKED),
        "eval.max_new_tokens": (3, ASKED), "eval.allow_code": (True, ASKED),
        "group_by_length": (True, {}),
        "sync_interval": (7, {}), "distributed_backend": ("gloo", {}), "n_data_parallel": (1, {}),
        "reshard_after_forward": (False, {}), "teacher_sharding": ("replicated", {}),
        "warmup_steps": (5, {"optimizer.schedule": "constant"}),
        "optimizer.lr_min_ratio": (0.5, {"optimizer.lr_scheduler_type": "constant_with_warmup"}),
        "max_length_teacher": (9, {**CLM, **NO_HELDOUT}), "uncertainty_s_init": (1.0, {}),
        "ema_alpha": (0.5, {"loss_weight_mode": "balance"}), "multitask_aggregation_fn": ("pcgrad", CLM),
        "mined_mapping_path": ("x", {"losses": ["baseline_dskd"]}),
        "tokenizer_pair_data_path": ("x", {"losses": ["baseline_dskd"]}), "alm_diff_fn": ("abs", ULD),
        "alm_mode": ("none", CLM), "distill_chunk_sizes": ([2], CLM),
        "distill_main_path_numerator": ("token_count", CLM),
        "distill_main_path_denominator": ("token_count", CLM),
        "renyi_alpha": (0.3, {"alm_diff_fn": "abs"}), "binarization_temp": (3.0, {"alm_diff_fn": "renyi"}),
        "space_mask_mode": ("space", {"alm_mode": "append_space+eos_as_space"}),
        "tokenizer_pair_bias_threshold": (0.2, {"alm_mode": "append_space"}),
        "side_path_mapping_mode": ("mined", CLM), "side_path_distance_fn": ("kl", CLM),
        "tokenizer_pair_bias_threshold_side_path": (0.2, {"losses": ["alm_side_path"]}),
        "latents_to_align": ("qkv", {"prefix_steps": 2, "n_prefix_layers": 1}),
        "latents_normalization": ("l1", CLM), "latents_chunks": ("space", CLM),
        "latents_do_project": (True, CLM), "baseline.divergence": ("js", {"losses": ["baseline_xtoken"]}),
        "baseline.kd_temp": (2.0, CLM), "baseline.kd_rate": (0.5, CLM),
        "baseline.teacher_temperature": (2.0, ULD),
        "baseline.skew_lambda": (0.2, {"losses": ["baseline_dskd"]}),
        "baseline.adaptive_kl_alpha": (0.2, {"losses": ["baseline_dskd"], "baseline.divergence": "skl"}),
        "baseline.dskd_use_causal_attention_mask": (False, CLM), "baseline.gradnorm_alpha": (2.0, {}),
        "baseline.gradnorm_lr": (0.1, {}),
        **{
            f"model_lora_{name}": (value, {"train_model_mode": "full"})
            for name, value in {
                "rank": 4, "alpha": 2.0, "dropout": 0.1, "targets": ["q_proj"], "target_regex": ".*q_proj",
                "layers": "0", "modules_to_save": ["lm_head"],
            }.items()
        },
        "hypernet.num_layers": (2, {"hypernet.architecture": "linear"}),
        "hypernet.num_heads": (2, {"hypernet.architecture": "mlp"}),
        "hypernet.use_attention": (False, {"hypernet.architecture": "mlp"}),
        "hypernet.use_attention_mask": (False, {"hypernet.use_attention": False}),
        "hypernet.residual": (False, IDENTITY), "hypernet.shared": (False, IDENTITY),
        "hypernet.residual_alpha": (2.0, {"hypernet.residual": False}), "prefix_lr": (0.1, {}),
        "prefix_trainable": ("embeddings", {}), "n_prefix_layers": (1, {}), "prefix_steps": (1, {}),
        "eval_interval": (3, NO_HELDOUT), "eval_at_step_zero": (False, {"data.heldout.documents": 0}),
        "wandb.project": ("x", {}), "eval_batch_size": (2, NO_HELDOUT),
        "skip_lm_eval": (True, {}), "data.dataset_config_name": ("x", {"data.dataset_name": LOCAL}),
        "data.split": ("test", NAMED), "data.streaming": (True, NAMED), "data.text_field": ("x", NAMED),
        "data.text_template": ("{x}", NAMED), "data.shuffle_buffer_size": (3, {}),
        "data.batch_size": (3, {}), "data.heldout.documents": (3, {"ppl_eval_data": "org/text"}),
        "data.heldout.dataset_name": ("x", {"ppl_eval_data": "org/text"}),
        "data.heldout.fraction": (0.2, {"data.heldout.dataset_name": "org/text"}),
        "data.bad_rows.quota": (0.5, {"data.bad_rows.action": "raise"}),
        "data.datasets": ([{"path": LOCAL, "subset": "x", "weight": 2}], {"data.dataset_name": None}),
        "export_to": ("", {}), "output_dir": ("", {}),
    },
    ZettConfig: {
        "model.revision": ("main", {"model.pretrained_model_name_or_path": LOCAL}),
        "convert_by_matching": (False, {}), "clone_all_layers": (True, {}), "num_atoms": (3, {}),
        "seed": (3, {"method": "focus", "auxiliary_model": "org/other"}), "max_eval_documents": (3, {}),
        "max_length": (9, {}), "ppl_eval_data": ("x", {}), "compare": ([], {}), "data": ("x", {}),
        "auxiliary_model": ("x", {}), "hypernet": ("x", {}),
    },
    PairStatsConfig: {
        "data.bad_rows.unencodable": ("drop", {}), "data.batch_size": (3, {}),
        "data.num_workers": (3, {}), "data.heldout.fraction": (0.5, {}),
        "data.heldout.documents": (3, {}), "seed": (3, {}), "data.shuffle_buffer_size": (3, {}),
        "data.dataset_config_name": ("x", {"data.dataset_name": LOCAL}),
    },
    MinedMappingConfig: {},
    TrainHypernetConfig: {
        "model.revision": ("main", {"model.pretrained_model_name_or_path": LOCAL}),
        "data.batch_size": (3, {}), "data.num_workers": (3, {}), "data.heldout.documents": (3, {}),
        "data.shuffle_buffer_size": (3, {}),
        "hypernet.num_heads": (2, {"hypernet.architecture": "linear"}),
    },
    AlignOptions: {
        "limit": (3, {"text": "x"}),
    },
    EvalConfig: {},
    ExportConfig: {},
    BitsPerByteConfig: {},
    MergeLoraConfig: {},
    ReportConfig: {},
    AblateConfig: {}, DraftConfig: {}, EvalEnsembleConfig: {}, PretrainConfig: {},
}  # fmt: skip

ALM_ONLY = {"losses": ["alm_unconstrained"]}
FULL = {"train_model_mode": "full"}
NEW = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4}
SIDE = {"losses": ["alm_side_path"]}
LATENTS = {"losses": ["alm_latents"]}
DSKD = {"losses": ["baseline_dskd"]}
PREFIX = {"n_prefix_layers": 1, "prefix_steps": 1, "prefix_trainable": "embeddings"}
NETWORK = {"hypernet.architecture": "transformer", "hypernet.num_heads": 4}
UNTIED = {**NETWORK, "output_embeddings_mode": "untie"}
TALKS = {"data.dataset_name": HERE, "use_chat_template": False}
NOISY = {"data.bad_rows.quota": 0.5, "batch_size": 32}
LORA = {"train_model_mode": "lora", "model_lora_rank": 4}
GRADNORM = {**LORA, "multitask_aggregation_fn": "gradnorm"}
ACTS = {
    "baseline.exact_sort": (False, ULD), "baseline.uld_extended": (True, ULD),
    "baseline.gold.use_extended_uld": (False, GOLD),
    "baseline.gold.uld_token_merge_strategy": ("bayesian", GOLD),
    "baseline.gold.uld_use_hybrid_loss": (True, GOLD),
    "baseline.gold.uld_hybrid_matched_weight": (0.1, {**HYBRID, **SHARES}),
    "baseline.gold.uld_hybrid_unmatched_weight": (0.1, {**HYBRID, **SHARES}),
    "baseline.gold.uld_crossentropy_weight": (0.5, GOLD),
    "baseline.gold.uld_distillation_weight": (0.5, GOLD),
    "baseline.gold.uld_student_temperature": (2.0, GOLD),
    "baseline.gold.uld_teacher_temperature": (2.0, GOLD),
    "baseline.gold.uld_skip_student_eos": (False, POSITIONAL), "data.heldout.dataset_name": (HERE, {}),
    "baseline.gold.beta": (0.0, HYBRID),
    "student.pretrained_model_name_or_path": (HERE, {}), "student.tokenizer_name": ("byte", {}),
    "student.from_config": (NEW, {**FULL, "student.tokenizer_name": "byte", "losses": ["clm"]}),
    "eval_batch_size": (2, {}), "pack": (True, CLM), "teacher.pretrained_model_name_or_path": (HERE, {}),
    "teacher.tokenizer_name": ("byte", {"teacher.pretrained_model_name_or_path": HERE}),
    "target_tokenizer_name": ("byte", {}), "tokens_to_add": (["<x>"], {}),
    "special_tokens_mode": ("ignore", ALM_ONLY), "pad_to_multiple_of": (37, {}),
    "expand_input_ids": (True, {"target_tokenizer_name": "byte"}), "seed": (3, {}), "steps": (9, {}),
    "warmup_steps": (2, {}), "batch_size": (8, {}), "gradient_accumulation_steps": (2, {}),
    "max_length_teacher": (9, {}), "max_length_new": (9, {}),
    "use_chat_template": (False, {"data.dataset_name": HERE}),
    "chat_template_mode": ("direct_encode_no_force_eos", {}), "loss_mask_mode": ("all", TALKS),
    "ppl_eval_data": (HERE, {}), "losses": (["clm"], {}), "loss_weights": ([1.0, 5.0], {}),
    "loss_weight_mode": ("balance", {}), "uncertainty_s_init": (1.0, {"loss_weight_mode": "uncertainty"}),
    "ema_alpha": (0.1, {"loss_weight_mode": "ema"}), "loss_schedules": (["constant(2)", "constant"], {}),
    "multitask_aggregation_fn": ("pcgrad", {}),
    "mined_mapping_path": (HERE, {"losses": ["baseline_mined"]}), "alm_diff_fn": ("abs", {}),
    "alm_mode": ("none", ALM_ONLY), "binarization_temp": (3.0, {}),
    "renyi_alpha": (0.3, {"alm_diff_fn": "renyi", "alm_mode": "none"}),
    "distill_chunk_sizes": ([2], {"alm_mode": "append_space"}),
    "distill_main_path_numerator": ("token_count", {}),
    "distill_main_path_denominator": ("token_count", {}), "space_mask_mode": ("space", {}),
    "tokenizer_pair_bias_threshold": (0.0001, {}),
    "tokenizer_pair_data_path": (HERE, {"losses": ["alm_unbiased"]}),
    "side_path_mapping_mode": ("bias_threshold", {**SIDE, "tokenizer_pair_data_path": HERE}),
    "side_path_distance_fn": ("abs", SIDE),
    "tokenizer_pair_bias_threshold_side_path": (
        1.0, {**SIDE, "side_path_mapping_mode": "bias_threshold", "tokenizer_pair_data_path": HERE},
    ),
    "latents_to_align": ("qkv", LATENTS), "latents_normalization": ("l1", LATENTS),
    "latents_chunks": ("space", LATENTS),
    "latents_do_project": (True, {**LATENTS, "teacher.pretrained_model_name_or_path": HERE}),
    "baseline.divergence": ("js", DSKD), "baseline.kd_temp": (2.0, ULD),
    "baseline.kd_rate": (0.9, {"losses": ["clm", "baseline_uld"]}),
    "baseline.teacher_temperature": (2.0, DSKD),
    "baseline.skew_lambda": (0.9, {**DSKD, "baseline.divergence": "skl"}),
    "baseline.adaptive_kl_alpha": (0.9, {**DSKD, "baseline.divergence": "akl"}),
    "baseline.dskd_use_causal_attention_mask": (False, DSKD), "baseline.gradnorm_alpha": (300.0, GRADNORM),
    "baseline.gradnorm_lr": (0.5, GRADNORM), "train_model_mode": ("full", {}),
    "train_embeddings": (False, {}),
    "output_embeddings_mode": ("untie", {"student.pretrained_model_name_or_path": HERE}),
    "dtype": ("bfloat16", {}), "gradient_checkpointing": (True, {}), "loss_workspace_mib": (3, {}),
    "attn_implementation": ("eager", {}), "model_lora_rank": (2, LORA), "model_lora_alpha": (9.0, LORA),
    "model_lora_dropout": (0.5, LORA), "model_lora_targets": (["q_proj"], LORA),
    "model_lora_target_regex": (".*q_proj", LORA), "model_lora_layers": ("0", LORA),
    "model_lora_modules_to_save": (["norm"], LORA),
    "hypernet.architecture": ("mlp", {"hypernet.num_layers": 1}), "hypernet.num_layers": (2, NETWORK),
    "hypernet.num_heads": (2, NETWORK), "hypernet.residual": (False, NETWORK),
    "hypernet.residual_alpha": (3.0, NETWORK), "hypernet.use_attention": (False, NETWORK),
    "hypernet.use_attention_mask": (False, NETWORK), "hypernet.shared": (False, UNTIED),
    "n_prefix_layers": (2, PREFIX), "prefix_steps": (2, PREFIX), "prefix_lr": (0.5, PREFIX),
    "prefix_trainable": ("all", {**LORA, **PREFIX}), "optimizer.learning_rate": (0.1, {}),
    "optimizer.weight_decay": (0.9, {}), "optimizer.beta1": (0.1, {}), "optimizer.beta2": (0.1, {}),
    "optimizer.epsilon": (0.5, {}), "optimizer.max_grad_norm": (0.01, {}),
    "optimizer.lr_scheduler_type": ("linear", {}), "optimizer.schedule": ("constant", {}),
    "optimizer.lr_min_ratio": (0.9, {}), "optimizer.use_fused_adam": (False, {}),
    "optimizer.param_groups": ([{"pattern": "embed", "lr_scale": 0.1}], {}),
    "data.dataset_name": (HERE, {}), "data.streaming": (True, {}),
    "data.shuffle_buffer_size": (2, {"data.streaming": True}), "data.text_field": ("other", {}),
    "data.text_template": ("{text} {text}", {}), "data.num_workers": (2, {}),
    "data.datasets": ([{"path": HERE}], {"data.dataset_name": None}), "data.heldout.fraction": (0.4, {}),
    "data.heldout.documents": (2, {}), "data.bad_rows.action": ("raise", {**TALKS, **NOISY}),
    "data.bad_rows.quota": (0.0, {**TALKS, **NOISY}),
    "data.bad_rows.max_row_bytes": (40, {"data.bad_rows.quota": 1.0}),
    "data.bad_rows.max_file_bytes": (40, {}),
}  # fmt: skip

NEVER = {
    TrainConfig: {
        "data.batch_size",  # it must repeat batch_size
        "eval.temperature",
        "eval.num_beams",
        "eval.max_new_tokens",
        "eval.allow_code",
    },
    ZettConfig: {"clone_all_layers"},
    ExportConfig: {"with_pt", "device"},
    PretrainConfig: {"eval_config.evals_registry_path"},
}
ROWS = {
    "method": ("mean", {}), "extend_output_embeddings": (False, {}),
    "combine_output_embed_with_input": (True, {}), "convert_by_matching": (False, {"method": "overlap"}),
    "convert_bos_eos": (False, {}),
    "output_embeddings_mode": ("untie", {"model.pretrained_model_name_or_path": "tied"}),
    "tokens_to_add": (["<x>"], {}), "pad_to_multiple_of": (37, {}),
    "seed": (3, {"method": "random_normal"}), "num_atoms": (1, {"method": "omp", "data": "text.txt"}),
}  # fmt: skip
SAME_ROWS = {
    "convert_by_matching": (False, {}), "num_atoms": (1, {}), "seed": (3, {}),
}  # fmt: skip
