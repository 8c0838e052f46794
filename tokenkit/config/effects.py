"""Which options act only beside others: what a user set and nothing would read is said, in one line.

A rule names fields, what must hold for them to act, and the words for it. All doors share the mechanism; each
configuration has its table below. Values are by dotted name, as in YAML; a value that is the default is never
spoken of.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tokenkit.config.schema import flatten, leaves
from tokenkit.embeddings.options import MethodName
from tokenkit.losses.options import ALIASES, needs_teacher, readers
from tokenkit.optim_options import SCHEDULES, LearningRateSchedule, OptimizerOptions

Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """Fields that act under one condition."""

    names: tuple[str, ...]
    """Dotted; one that ends in `.` or `_` stands for all that begin with it."""
    needs: str
    """What reads them, to follow "read ..."."""
    acts: Callable[[Values], bool]


def without_effect(config: Any, given: Collection[str]) -> str | None:
    """Return one line about the options among `given` that nothing will read; None: there are none.

    Args:
        config: the configuration that was built.
        given: dotted names of what the user set.
    """
    values, schema = flatten(config), type(config)
    defaults = {leaf.name: leaf.default for leaf in leaves(schema)}  # type: ignore[arg-type]
    changed = [name for name in given if name in values and values[name] != defaults[name]]
    idle: dict[str, list[str]] = {}
    for name in changed:
        for rule in RULES.get(type(config).__name__, ()):
            if _is_named(name, rule) and not rule.acts(values):
                idle.setdefault(rule.needs, []).append(name)
                break
    for name, needs in _idle_in_datasets(values) if "data.datasets" in changed else ():
        idle.setdefault(needs, []).append(name)
    if not idle:
        return None
    parts = [f"{', '.join(names)} (read {needs})" for needs, names in idle.items()]
    return f"tokenkit: without effect here: {'; '.join(parts)}"


def _is_named(name: str, rule: Rule) -> bool:
    return any(name == n or (n[-1] in "._" and name.startswith(n)) for n in rule.names)


def is_local(location: str) -> bool:
    """Whether a name of a model or a data set is a path of this machine."""
    path = Path(location).expanduser()
    return path.exists() or path.is_absolute() or location.startswith((".", "~"))


def _losses(v: Values) -> set[str]:
    return {ALIASES.get(name, name) for name in v["losses"]}


def _has(*names: str) -> Callable[[Values], bool]:
    return lambda v: bool(_losses(v) & set(names))


ALM = ("alm_unconstrained", "alm_space", "alm_unbiased")


def _alm_and(condition: Callable[[Values], bool]) -> Callable[[Values], bool]:
    return lambda v: _has(*ALM)(v) and condition(v)


def _alm_modes(v: Values) -> set[str]:
    return set(v["alm_mode"].split("+"))


def _reads_spaces(v: Values) -> bool:
    modes = _alm_modes(v)
    return bool(modes & {"append_space", "merge_by_space_prob"}) and "eos_as_space" not in modes


def _side_path(mode: str) -> Callable[[Values], bool]:
    return lambda v: _has("alm_side_path")(v) and v["side_path_mapping_mode"] == mode


def _read_by_losses(flag: str, more: str = "", also: Callable[[Values], bool] = lambda v: True) -> Rule:
    """An option of losses acts where one of those is there that have it, and `also` holds."""
    names = readers(flag)
    words = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return Rule((flag,), f"by {words}{more}", lambda v: _has(*names)(v) and also(v))


def _diverges_by(*divergences: str) -> Callable[[Values], bool]:
    return lambda v: v["baseline.divergence"] in divergences


def _needs_teacher(v: Values) -> bool:
    return any(map(needs_teacher, v["losses"])) or bool(v["prefix_steps"])


def _pairs_chunks(v: Values) -> bool:
    own_or_chunked = _losses(v) - {"clm"}
    return bool(own_or_chunked) or bool(v["prefix_steps"])


def _is_moved(v: Values) -> bool:
    asks = v["target_tokenizer_name"] is not None or bool(v["tokens_to_add"])
    return asks or v["output_embeddings_mode"] == "untie"


def _heldout(v: Values) -> bool:
    source = v["data.heldout.dataset_name"] is not None or v["data.heldout.fraction"] > 0
    own = source and v["data.heldout.documents"] > 0
    return own or v["ppl_eval_data"] is not None


def _asks(v: Values) -> bool:
    return bool(v["eval.tasks"]) and not v["skip_lm_eval"]


def _schedule(v: Values) -> LearningRateSchedule:
    return OptimizerOptions(
        schedule=v["optimizer.schedule"], lr_scheduler_type=v["optimizer.lr_scheduler_type"]
    ).schedule_name


def _aggregation(v: Values) -> str:
    return str(v["multitask_aggregation_fn"] or "")


SCALING = ("gradmag", "gradclip", "approx_gradmag")  # of aggregations, what changes the gradient of one loss


def _several_processes(v: Values) -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _on_hub(prefix: str) -> Callable[[Values], bool]:
    return lambda v: not is_local(v[f"{prefix}.pretrained_model_name_or_path"])


def _streams(v: Values) -> bool:
    return v["data.streaming"] or any(source.streaming for source in v["data.datasets"])


def _is_one_file(v: Values) -> bool:
    name = v["data.dataset_name"]
    return name is not None and Path(name).expanduser().is_file()


def _never(v: Values) -> bool:
    return False


def _network(*architectures: str) -> Callable[[Values], bool]:
    return lambda v: v["hypernet.architecture"] in architectures


def _attends(v: Values) -> bool:
    return _network("transformer")(v) and v["hypernet.use_attention"]


HYPERNET = (
    Rule(
        ("hypernet.num_heads", "hypernet.use_attention_mask"),
        "by hypernet.architecture transformer with use_attention", _attends,
    ),
    Rule(
        ("hypernet.use_attention",), "by hypernet.architecture transformer", _network("transformer")
    ),
    Rule(
        ("hypernet.num_layers",), "by hypernet.architecture mlp and transformer",
        _network("mlp", "transformer"),
    ),
    Rule(("hypernet.residual_alpha",), "with hypernet.residual", lambda v: v["hypernet.residual"]),
    Rule(
        ("hypernet.residual", "hypernet.residual_alpha", "hypernet.shared"),
        "by a hypernet.architecture that is not identity", _network("linear", "mlp", "transformer"),
    ),
)  # fmt: skip

DATA = (
    Rule(
        ("data.dataset_config_name", "data.split", "data.streaming", "data.text_field", "data.text_template"),
        "with data.dataset_name: each of data.datasets has its own", lambda v: not v["data.datasets"],
    ),
    Rule(
        ("data.dataset_config_name",), "of a hub data set",
        lambda v: not is_local(v["data.dataset_name"] or "."),
    ),
    Rule(("data.split",), "of a hub data set or a folder", lambda v: not _is_one_file(v)),
    Rule(
        ("data.bad_rows.quota",), "with data.bad_rows.action skip",
        lambda v: v["data.bad_rows.action"] == "skip",
    ),
)  # fmt: skip

ORDER = (Rule(("data.shuffle_buffer_size",), "with data.streaming", _streams),)

TRAIN = (
    Rule(("student.revision",), "of a hub model", _on_hub("student")),
    Rule(("teacher.revision",), "of a hub model", _on_hub("teacher")),
    Rule(
        ("pad_to_multiple_of",), "where rows are made: target_tokenizer_name, tokens_to_add, or "
        "output_embeddings_mode untie", _is_moved,
    ),
    Rule(("special_tokens_mode",), "by losses that compare chunks", _pairs_chunks),
    Rule(
        ("sync_interval", "distributed_backend", "n_data_parallel", "reshard_after_forward",
         "teacher_sharding"), "with several processes (torchrun)", _several_processes,
    ),
    Rule(("warmup_steps",), "by every optimizer.schedule but constant", lambda v: SCHEDULES[_schedule(v)][0]),
    Rule(
        ("optimizer.lr_min_ratio",), "by schedules that decay",
        lambda v: SCHEDULES[_schedule(v)][1] != "constant",
    ),
    Rule(("group_by_length",), "with several micro-batches", lambda v: v["gradient_accumulation_steps"] > 1),
    Rule(
        ("max_length_teacher",), "by losses with a teacher, and by measurements on held-out text",
        lambda v: _needs_teacher(v) or _heldout(v),
    ),
    Rule(
        ("uncertainty_s_init",), "with loss_weight_mode uncertainty",
        lambda v: v["loss_weight_mode"] == "uncertainty",
    ),
    Rule(("ema_alpha",), "with loss_weight_mode ema", lambda v: v["loss_weight_mode"] == "ema"),
    Rule(
        ("multitask_aggregation_fn",), "where there are several losses",
        lambda v: len(v["losses"]) > 1 or _aggregation(v).startswith(SCALING),
    ),
    Rule(
        ("mined_mapping_path",), "by baseline_mined and side_path_mapping_mode mined",
        lambda v: _has("baseline_mined")(v) or _side_path("mined")(v),
    ),
    Rule(
        ("tokenizer_pair_data_path",), "by alm_unbiased and side_path_mapping_mode bias_threshold",
        lambda v: _has("alm_unbiased")(v) or _side_path("bias_threshold")(v),
    ),
    Rule(
        ("renyi_alpha",), "by alm_diff_fn renyi in an ALM loss",
        _alm_and(lambda v: v["alm_diff_fn"] == "renyi"),
    ),
    Rule(
        ("binarization_temp",), "by ALM losses whose alm_diff_fn has a temperature",
        _alm_and(lambda v: v["alm_diff_fn"] not in ("abs", "renyi", "binary_kl_temp_limit")),
    ),
    Rule(
        ("tokenizer_pair_bias_threshold",), "by alm_unbiased and ALM with alm_mode merge_by_space_prob",
        lambda v: _has("alm_unbiased")(v) or _alm_and(lambda v: "merge_by_space_prob" in _alm_modes(v))(v),
    ),
    Rule(
        ("space_mask_mode",), "by ALM losses with alm_mode append_space or merge_by_space_prob, where EOS "
        "does not stand in", _alm_and(_reads_spaces),
    ),
    Rule(("alm_", "distill_"), f"by {', '.join(ALM)}", _has(*ALM)),
    Rule(
        ("tokenizer_pair_bias_threshold_side_path",), "by alm_side_path with side_path_mapping_mode "
        "bias_threshold",
        _side_path("bias_threshold"),
    ),
    Rule(("side_path_",), "by alm_side_path", _has("alm_side_path")),
    Rule(
        ("latents_normalization", "latents_chunks"), "by alm_latents and the prefix stage",
        lambda v: _has("alm_latents")(v) or bool(v["prefix_steps"]),
    ),
    Rule(("latents_",), "by alm_latents", _has("alm_latents")),
    _read_by_losses(
        "baseline.skew_lambda", " with divergence skl or srkl", _diverges_by("skl", "srkl")
    ),
    _read_by_losses("baseline.adaptive_kl_alpha", " with divergence akl", _diverges_by("akl")),
    *map(
        _read_by_losses,
        (
            "baseline.divergence", "baseline.dskd_use_causal_attention_mask", "baseline.uld_extended",
            "baseline.exact_sort", "baseline.teacher_temperature", "baseline.kd_temp",
        ),
    ),
    Rule(
        ("baseline.gold.uld_hybrid_", "baseline.gold.beta"), "by baseline_gold with uld_use_hybrid_loss",
        lambda v: _has("baseline_gold")(v) and v["baseline.gold.uld_use_hybrid_loss"],
    ),
    Rule(("baseline.gold.",), "by baseline_gold", _has("baseline_gold")),
    Rule(
        ("baseline.gradnorm_",), "with multitask_aggregation_fn gradnorm",
        lambda v: "gradnorm" in _aggregation(v),
    ),
    Rule(("model_lora_",), "with train_model_mode lora", lambda v: v["train_model_mode"] == "lora"),
    Rule(("prefix_lr", "prefix_trainable"), "with prefix_steps", lambda v: v["prefix_steps"] > 0),
    Rule(
        ("data.heldout.fraction",), "where data.heldout.dataset_name is not set",
        lambda v: v["data.heldout.dataset_name"] is None,
    ),
    Rule(
        ("data.heldout.dataset_name",), "where ppl_eval_data is not set", lambda v: v["ppl_eval_data"] is None
    ),
    Rule(("data.heldout.documents",), "where ppl_eval_data is not set", lambda v: v["ppl_eval_data"] is None),
    Rule(
        ("eval_interval", "eval_at_step_zero"), "where text is held out, or ppl_eval_data or eval.tasks set",
        lambda v: _heldout(v) or _asks(v),
    ),
    Rule(("wandb.",), "with report_to wandb", lambda v: v["report_to"] == "wandb"),
    Rule(("eval_batch_size",), "where text is held out, or ppl_eval_data is set", _heldout),
    Rule(
        ("eval.temperature", "eval.num_beams", "eval.max_new_tokens", "eval.allow_code"),
        "by `tokenkit eval`: on the way of a training no answers are written", _never,
    ),
    Rule(("eval.",), "with eval.tasks, and without skip_lm_eval", _asks),
    Rule(("skip_lm_eval",), "beside eval.tasks", lambda v: bool(v["eval.tasks"])),
    *HYPERNET, *DATA, *ORDER,
)  # fmt: skip


def _methods(v: Values) -> set[str]:
    return {v["method"]} if v["compare"] is None else set(v["compare"]) or set(get_args(MethodName))


ZETT = (
    Rule(("model.revision",), "of a hub model", _on_hub("model")),
    Rule(
        ("convert_by_matching",), "by every method but fvt, mean and hypernet, whose rows of such tokens are "
        "the same either way", lambda v: bool(_methods(v) - {"fvt", "mean", "hypernet"}),
    ),
    Rule(("num_atoms",), "by method omp", lambda v: "omp" in _methods(v)),
    Rule(
        ("seed",), "by method random_normal, and where data makes an auxiliary space",
        lambda v: "random_normal" in _methods(v) or v["data"] is not None,
    ),
    Rule(("clone_all_layers",), "by nothing: the folder is the same, from twice the memory", _never),
    Rule(("max_eval_documents", "max_length"), "by compare", lambda v: v["compare"] is not None),
)  # fmt: skip


def _takes_shares(v: Values) -> bool:
    return min(v["teacher_subsample_percent"], v["student_subsample_percent"]) < 100


PAIR_STATS = (
    Rule(
        ("data.batch_size", "data.num_workers", "data.heldout.", "data.bad_rows.unencodable"),
        "by training: here every document is counted, one after the other", _never,
    ),
    Rule(("seed",), "with a subsample percentage below 100", _takes_shares),
    Rule(
        ("data.shuffle_buffer_size",), "with data.streaming and a subsample percentage below 100",
        lambda v: _streams(v) and _takes_shares(v),
    ),
    *DATA,
)  # fmt: skip

TRAIN_HYPERNET = (
    Rule(("model.revision",), "of a hub model", _on_hub("model")),
    Rule(
        ("data.batch_size", "data.num_workers"), "by `tokenkit train`: here batch_size counts, and texts are "
        "tokenized between steps", _never,
    ),
    Rule(
        ("data.heldout.documents", "data.heldout.dataset_name"),
        "by `tokenkit train`: nothing is measured here", _never,
    ),
    Rule(
        ("data.bad_rows.unencodable",), "by `tokenkit train`: here tokenizers are drawn that write all text",
        _never,
    ),
    *HYPERNET, *DATA, *ORDER,
)  # fmt: skip

ALIGN = (Rule(("limit",), "with file", lambda v: v["file"] is not None),)

RULES: dict[str, tuple[Rule, ...]] = {
    "TrainConfig": TRAIN,
    "ZettConfig": ZETT,
    "PairStatsConfig": PAIR_STATS,
    "TrainHypernetConfig": TRAIN_HYPERNET,
    "AlignOptions": ALIGN,
}
"""By the name of a configuration's class: the doors import this, not the other way round."""


def _idle_in_datasets(v: Values) -> list[tuple[str, str]]:
    """The options of single data sets that nothing reads, with what would."""
    sources, found = v["data.datasets"], []
    for source in sources:
        local = is_local(source.path if source.path is not None else str(source.name))
        checks = {
            "weight": (source.weight != 1 and len(sources) == 1, "where there are several data sets"),
            "subset": (source.subset is not None and local, "of a hub data set"),
            "format": (source.format is not None and not local, "of local files"),
        }
        found += [(f"data.datasets.{name}", needs) for name, (idle, needs) in checks.items() if idle]
    return found
