"""For every option that moves no number of a step: the test that shows what it does."""

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
from tokenkit.config.schema import leaves

ELSEWHERE = {
    TrainConfig: {
        **dict.fromkeys(
            (
                "skip_lm_eval", "eval.tasks", "eval.task_data", "eval.limit", "eval.num_fewshot",
                "eval.batch_size",
            ),
            "training/test_benchmarks.py::test_tasks_are_measured_on_the_way",
        ),
        **dict.fromkeys(
            ("eval.add_bos", "eval.chat_template_mode", "eval.max_length"),
            "commands/test_eval.py::test_options_become_what_is_asked",
        ),
        "name": "config/test_effects.py::test_a_run_is_called_what_the_user_calls_it",
        "output_dir": "training/test_loop.py::test_a_run_lowers_its_losses_and_exports_a_model_that_loads",
        "resume": "training/test_resume.py::test_a_killed_run_resumes_to_the_same_bits",
        "dry_run": "training/test_loop.py::test_a_dry_run_writes_nothing",
        "do_cost_analysis": "training/test_estimate.py::test_a_run_says_its_cost_before_it_loads_anything",
        "debug": "test_cli.py::test_debug_shows_the_traceback_too",
        "export_to": "config/test_effects.py::test_a_run_is_called_what_the_user_calls_it",
        "report_to": "run/test_metrics.py::test_wandb_works_offline_and_no_key_reaches_any_file",
        "trust_remote_code": "config/test_config.py::test_settings_that_contradict_each_other_are_refused",
        "student.revision": "training/test_loop.py::test_added_tokens_leave_the_students_revision_as_it_is",
        "teacher.revision": "training/test_loop.py::test_added_tokens_leave_the_students_revision_as_it_is",
        "save_interval": "training/test_resume.py::test_a_killed_run_resumes_to_the_same_bits",
        "skip_nonfinite": "faults/test_divergence.py::test_as_many_steps_are_skipped_as_may_be",
        "async_save": "faults/test_async_saves.py::test_the_next_steps_are_taken_meanwhile",
        "keep_checkpoints": "faults/test_async_saves.py::test_as_many_are_kept_as_were_asked_for",
        "logging_interval": "config/test_effects.py::test_a_run_is_called_what_the_user_calls_it",
        "eval_interval": "training/test_loop.py::test_a_run_lowers_its_losses_and_exports_a_model_that_loads",
        "eval_at_step_zero": "training/test_resume.py::test_a_resume_from_step_zero_evaluates_it_once",
        "save_at_step_zero": "training/test_resume.py::test_a_resume_from_step_zero_evaluates_it_once",
        "sync_interval": "training/test_resume.py::test_a_killed_run_resumes_to_the_same_bits",
        "use_distributed": "training/test_loop.py::test_bad_input_is_one_clear_error_before_any_step",
        "distributed_backend": "test_parallel.py::test_sizes_and_backends_that_cannot_work_are_refused",
        "baseline.gold.uld_skip_teacher_eos": "losses/test_gold.py::test_frozen_values_of_trl",
        "data.bad_rows.unencodable":
            "data/test_unwritable.py::test_the_row_or_its_characters_are_left_out",
        "hang_timeout": "test_parallel.py::test_a_rank_that_hangs_is_noticed_after_the_timeout",
        **dict.fromkeys(
            ("reshard_after_forward", "teacher_sharding"),
            "training/test_gathers.py::test_a_step_gathers_each_vocabulary_once",
        ),
        "n_data_parallel": "test_parallel.py::test_sizes_and_backends_that_cannot_work_are_refused",
        **dict.fromkeys(
            ("compile", "use_liger_kernel"),
            "training/test_blocks.py::test_what_cannot_be_had_is_refused_by_name",
        ),
        "float8": "training/test_pretrain.py::test_float8_is_refused_with_its_reason",
        **dict.fromkeys(
            ("wandb.project", "wandb.entity", "wandb.log_model"),
            "run/test_metrics.py::test_wandb_works_offline_and_no_key_reaches_any_file",
        ),
        **dict.fromkeys(
            ("pack_documents", "group_by_length"),
            "training/test_lockstep.py::test_every_loss_is_the_same_however_documents_lie",
        ),
        "tf32": "training/test_pretrain.py::test_tf32_is_of_the_gpus_products",
        "use_flash_attention": "config/test_effects.py::test_flash_attention_is_the_attention_of_that_name",
        "data.split": "data/test_mix.py::test_hub_data_sets_resume_like_local_ones",
        "data.dataset_config_name": "data/test_mix.py::test_hub_data_sets_resume_like_local_ones",
        "optimizer.name": "test_optim.py::test_bad_options_name_the_field_and_the_rule",
    },
    ZettConfig: {
        "convert_by_special": "embeddings/test_methods.py::test_what_is_not_to_be_copied_is_made_otherwise",
        "output": "commands/test_zett.py::test_an_output_that_is_not_empty_is_left_alone",
        "model.pretrained_model_name_or_path":
            "commands/test_zett.py::test_the_folder_loads_and_holds_the_rows",
        "model.tokenizer_name": "commands/test_zett.py::test_a_tokenizer_with_more_ids_than_rows_is_refused",
        "model.revision": "training/test_loop.py::test_added_tokens_leave_the_students_revision_as_it_is",
        "target_tokenizer_name": "commands/test_zett.py::test_the_folder_loads_and_holds_the_rows",
        "dtype": "commands/test_zett.py::test_a_model_keeps_its_dtype_and_its_tied_head",
        "trust_remote_code": "config/test_config.py::test_settings_that_contradict_each_other_are_refused",
        "data": "commands/test_zett.py::test_methods_are_compared",
        "hypernet": "test_train_hypernet.py::test_the_door_of_zett_applies_it",
        "auxiliary_model": "commands/test_zett.py::test_bad_input_is_one_line",
        "compare": "commands/test_zett.py::test_methods_are_compared",
        "ppl_eval_data": "commands/test_zett.py::test_methods_are_compared",
        "max_eval_documents": "commands/test_zett.py::test_methods_are_compared",
        "max_length": "commands/test_zett.py::test_methods_are_compared",
        **{
            name: "config/test_effects.py::test_what_zett_reads_changes_the_rows" for name in (
                "method", "extend_output_embeddings", "combine_output_embed_with_input",
                "convert_by_matching", "convert_bos_eos", "output_embeddings_mode", "tokens_to_add",
                "pad_to_multiple_of", "num_atoms", "seed",
            )
        },
    },
    PairStatsConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(PairStatsConfig)],
        "commands/test_pair_stats.py::test_what_is_written_is_read_again",
    ),
    MinedMappingConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(MinedMappingConfig)],
        "pairing/test_mining.py::test_the_door_writes_once_and_says_what_it_mapped",
    ),
    TrainHypernetConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(TrainHypernetConfig)],
        "test_train_hypernet.py::test_it_writes_what_transfer_reads",
    ),
    EvalConfig: {
        **dict.fromkeys(
            ("models", "output", "tasks", "limit", "num_fewshot", "task_data", "batch_size", "log_samples",
             "max_new_tokens", "seed", "dtype"),
            "commands/test_eval.py::test_scores_are_those_of_the_stock_class",
        ),
        **dict.fromkeys(
            ("max_length", "add_bos", "chat_template_mode", "temperature", "num_beams"),
            "commands/test_eval.py::test_options_become_what_is_asked",
        ),
        "allow_code": "commands/test_eval.py::test_a_task_that_runs_programs_must_be_allowed_to",
        **dict.fromkeys(
            ("tokenizer_name", "base_model", "base_tokenizer", "device", "trust_remote_code"),
            "commands/test_eval.py::test_the_model_is_opened_as_it_is_asked_for",
        ),
    },
    ExportConfig: {
        **dict.fromkeys(
            ("checkpoint_path", "output", "dtype", "base_model", "base_tokenizer", "target_tokenizer_name"),
            "commands/test_export.py::test_a_checkpoint_in_the_middle_is_written_with_its_own_figures",
        ),
        "as_adapter": "commands/test_export.py"
        "::test_adapters_are_written_for_peft_with_the_embeddings_that_moved",
        "trust_remote_code": "commands/test_export.py::test_code_of_a_models_own_must_be_trusted_here_too",
        "verify": "export/test_verification.py::test_a_difference_is_named",
        "gguf_type": "export/test_gguf.py::test_the_command_writes_a_folder_whose_file_is_read",
        "text": "export/test_quantised.py::test_the_folder_is_loaded_by_transformers_and_smaller",
        "use_cache": "export/test_onnx.py::test_a_graph_without_a_cache_reads_whole_texts",
        "dynamic_axes": "commands/test_export.py::test_a_mistake_in_the_words_comes_before_torch",
        "format": "commands/test_export.py::test_a_mistake_in_the_words_comes_before_torch",
    },
    BitsPerByteConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(BitsPerByteConfig)],
        "commands/test_bits_per_byte.py::test_it_is_the_sum_over_tokens_also_in_windows",
    ),
    MergeLoraConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(MergeLoraConfig)],
        "commands/test_merge_lora.py::test_a_folder_of_peft_and_its_base_become_one_model",
    ),
    ReportConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(ReportConfig)],
        "commands/test_report.py::test_all_parts_are_there_of_a_run_and_of_one_that_was_cut",
    ),
    AblateConfig: {
        **dict.fromkeys(
            ("base_config", "output_dir", "axes", "custom_datasets", "tokens", "list"),
            "commands/test_ablate.py::test_each_combination_is_run_once_and_compared",
        ),
        **dict.fromkeys(
            ("jobs", "launch", "slurm", "slurm_options"),
            "commands/test_ablate.py::test_runs_are_started_as_those_of_a_sweep",
        ),
    },
    DraftConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(DraftConfig)],
        "commands/test_draft.py::test_what_is_asked_reaches_those_who_do_it",
    )
    | {"scores": "commands/test_draft.py::test_it_is_measured_before_and_after_the_move"}
    | dict.fromkeys(("num_beams", "stop"), "commands/test_draft.py::test_a_mistake_is_one_line"),
    EvalEnsembleConfig: {
        **dict.fromkeys(
            ("models", "prompts", "max_new_tokens", "temperature", "top_k", "top_p", "num_beams", "stop",
             "seed", "dtype", "device", "trust_remote_code"),
            "commands/test_eval_ensemble.py::test_what_is_asked_reaches_those_who_do_it",
        ),
        **dict.fromkeys(
            ("text", "max_length", "stride", "batch_size", "limit", "weights", "output"),
            "commands/test_eval_ensemble.py"
            "::test_bits_per_byte_are_those_of_the_mean_and_members_those_of_the_other_door",
        ),
        **dict.fromkeys(
            ("combine_strategy", "baseline_mined_mapping_paths"),
            "commands/test_eval_ensemble.py::test_a_member_with_another_tokenizer_needs_a_mapping",
        ),
        **dict.fromkeys(
            ("eval.tasks", "eval.task_data", "eval.limit", "eval.num_fewshot", "eval.batch_size"),
            "commands/test_eval_ensemble.py::test_benchmarks_ask_the_ensemble",
        ),
        "eval.allow_code": "commands/test_eval.py::test_a_task_that_runs_programs_must_be_allowed_to",
        **dict.fromkeys(
            ("eval.max_length", "eval.add_bos", "eval.chat_template_mode", "eval.temperature",
             "eval.num_beams", "eval.max_new_tokens"),
            "commands/test_eval.py::test_options_become_what_is_asked",
        ),
    },
    PretrainConfig: dict.fromkeys(
        [leaf.name for leaf in leaves(PretrainConfig)],
        "commands/test_pretrain.py::test_every_field_becomes_one_of_the_run",
    ),
    AlignOptions: dict.fromkeys(
        [leaf.name for leaf in leaves(AlignOptions)],
        "commands/test_align.py::test_a_text_is_shown_with_its_numbers",
    ),
}  # fmt: skip
"""Where a test shows it of a field that moves no number of a step."""
