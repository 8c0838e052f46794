"""The configuration of a training run. Each component's part is in its own file; this one composes them."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tokenkit.config.benchmarks import LmEval
from tokenkit.config.later import refuse_later
from tokenkit.config.models import ModelSource, StudentSource, Target, Training
from tokenkit.config.objective import Objective
from tokenkit.config.schema import flatten
from tokenkit.data.options import DataOptions, TextOptions
from tokenkit.errors import ConfigError, at_least, names_a_folder
from tokenkit.optim_options import OptimizerOptions
from tokenkit.options import MOST_DOCUMENTS, MOST_STEPS, flat

ALIASES = {
    "new": "student",
    "target_tokenizer": "target_tokenizer_name",
    "output": "output_dir",
    "optimizer.grad_acc_steps": "gradient_accumulation_steps",
    "optimizer.warmup_steps": "warmup_steps",
    "data.batch_size": "batch_size",
    "log_interval": "logging_interval",
    "max_teacher_length": "max_length_teacher",
    "max_student_length": "max_length_new",
    "model_lora_r": "model_lora_rank",
    "optimizer.type": "optimizer.name",
    "save_total_limit": "keep_checkpoints",
}
"""Other names of fields and groups. Each is accepted, and reported once."""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Where a run is reported with `report_to: wandb`. Keys and WANDB_MODE stay in the environment."""

    project: str | None = None
    """The project. None: WANDB_PROJECT, or tokenkit."""

    entity: str | None = None
    """User or team. None: that of the key."""

    log_model: Literal["checkpoints", "all"] | None = None
    """Upload each checkpoint as it is written; both words say that. None: nothing is uploaded."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the run is called, and what it leaves behind."""

    name: str = "tokenkit"
    """Name of the run, for people and trackers."""

    output_dir: str = "outputs/tokenkit"
    """Folder of everything that the run writes. One that is not empty is refused without resume."""

    seed: int = 0
    """Seed of data order, initialisation and dropout."""

    resume: bool = False
    """Continue from the newest valid checkpoint in output_dir; start where there is none."""

    dry_run: bool = False
    """Load everything, run one step without keeping its result, and write nothing."""

    do_cost_analysis: bool = False
    """Print before the start what memory and communication each process will need (docs/estimate.md)."""

    debug: bool = False
    """Show the traceback of an error."""

    export_to: str | None = None
    """Folder of the model in Hugging Face layout. None: OUTPUT_DIR/export."""

    report_to: Literal["none", "wandb", "tensorboard"] = "none"
    """Experiment tracker, beside metrics.jsonl and curves.png."""

    wandb: Wandb = field(default_factory=Wandb)

    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer. On the hub it needs student.revision as a 40-digit
    commit."""

    def __post_init__(self) -> None:
        if not self.output_dir.strip():
            raise ConfigError("output_dir is empty: name the folder that the run writes to")
        if self.export_to is not None:
            names_a_folder("export_to", self.export_to)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2**63), got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, in which portions, and how often what happens."""

    steps: int = 5000
    """Optimizer steps."""

    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly to its peak."""

    batch_size: int = 16
    """Documents per optimizer step, over all ranks."""

    gradient_accumulation_steps: int = 1
    """Forward and backward passes that an optimizer step is cut into, on each rank."""

    pack: bool = False
    """Fill rows of max_length_new tokens with documents, one behind the other, which do not see each other;
    what has no room goes on in the next row. batch_size then counts rows. With clm alone."""

    skip_nonfinite: int = 0
    """Steps of the whole run that are skipped where a loss or gradient is not finite: nothing is updated, and
    the data goes on. One more ends the run. The overflows of dtype float16 are always skipped, uncounted."""

    save_interval: int = 1000
    """Steps between two checkpoints."""

    async_save: bool = False
    """Write checkpoints while the next steps are taken, from a copy of what is trained and its moments in the
    machine's memory. What cannot be written ends the run before its next step."""

    keep_checkpoints: int = 2
    """Newest checkpoints that are kept, at least 2; older ones are deleted."""

    logging_interval: int = 10
    """Steps between two lines of metrics.jsonl."""

    sync_interval: int = 100
    """Steps between two points at which all ranks wait for each other."""

    save_at_step_zero: bool = False
    """Save a checkpoint before the first step."""

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1, MOST_STEPS)
        at_least("warmup_steps", self.warmup_steps, 0)
        at_least("skip_nonfinite", self.skip_nonfinite, 0, MOST_STEPS)
        for name in ("batch_size", "gradient_accumulation_steps", "save_interval"):
            at_least(name, getattr(self, name), 1, MOST_STEPS if name == "save_interval" else MOST_DOCUMENTS)
        at_least("keep_checkpoints", self.keep_checkpoints, 2, MOST_STEPS)
        at_least("logging_interval", self.logging_interval, 1)
        at_least("sync_interval", self.sync_interval, 1)
        if self.warmup_steps > self.steps:
            raise ConfigError(f"warmup_steps ({self.warmup_steps}) must not exceed steps ({self.steps})")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"batch_size ({self.batch_size}) must be a multiple of gradient_accumulation_steps "
                f"({self.gradient_accumulation_steps})"
            )


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured on text held out of training."""

    eval_interval: int = 500
    """Steps between two measurements of bits per byte."""

    eval_at_step_zero: bool = True
    """Measure before the first step, too: the end of the run then says what it changed."""

    eval_batch_size: int = 8
    """Documents that are measured together, on each process."""

    ppl_eval_data: str | None = None
    """File of held-out text. None: the held-out part of the training data."""

    skip_lm_eval: bool = False
    """Leave the benchmarks of eval.tasks out."""

    eval: LmEval = field(default_factory=LmEval)

    def __post_init__(self) -> None:
        at_least("eval_interval", self.eval_interval, 1)
        at_least("eval_batch_size", self.eval_batch_size, 1, MOST_DOCUMENTS)


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How many processes share the work."""

    use_distributed: bool = False
    """Shard the models over processes. torchrun turns it on; without torchrun it is an error."""

    distributed_backend: Literal["nccl", "gloo"] | None = None
    """None: nccl on GPUs, gloo on CPUs."""

    n_data_parallel: int | None = None
    """Processes that the batch is cut over. None: all. n_data_parallel x n_model_parallel = processes."""

    n_model_parallel: int = 1
    """Processes that share one vocabulary and its layers."""

    reshard_after_forward: bool = True
    """Free a layer's gathered weights between forward and backward: half the memory, twice the gathers."""

    teacher_sharding: Literal["sharded", "replicated"] = "sharded"
    """replicated: each process holds the whole teacher, which is then not gathered layer by layer."""

    hang_timeout: float = 600.0
    """Seconds that a step, another process or the next documents may keep a process waiting. Then the run
    ends and says who was waited for."""

    def __post_init__(self) -> None:
        at_least("n_data_parallel", self.n_data_parallel, 1)
        at_least("n_model_parallel", self.n_model_parallel, 1)
        at_least("hang_timeout", self.hang_timeout, 1, 10**6)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Move a language model to another tokenizer: train a student against a teacher."""

    student: StudentSource
    teacher: ModelSource | None = None
    target: Target = flat(Target)
    run: Run = flat(Run)
    schedule: Schedule = flat(Schedule)
    text: TextOptions = flat(TextOptions)
    objective: Objective = flat(Objective)
    training: Training = flat(Training)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    data: DataOptions = field(default_factory=DataOptions)
    evaluation: Evaluation = flat(Evaluation)
    parallel: Parallel = flat(Parallel)

    def __post_init__(self) -> None:
        refuse_later(flatten(self), TrainConfig)
        if (
            self.teacher is None
            and self.target.target_tokenizer_name is None
            and self.objective.needs_teacher
        ):
            raise ConfigError(
                "neither target_tokenizer_name nor teacher.pretrained_model_name_or_path is set: the student "
                "would be its own teacher with the same tokenizer; set one of them"
            )
        if self.data.dataset_name is None and not self.data.datasets:
            raise ConfigError(
                "missing required field data.dataset_name (or data.datasets): there is nothing to train on"
            )
        if self.data.batch_size not in (None, self.schedule.batch_size):
            raise ConfigError(
                f"data.batch_size ({self.data.batch_size}) contradicts batch_size "
                f"({self.schedule.batch_size}): remove data.batch_size"
            )
        at_least("max_length_teacher", self.text.max_length_teacher, 2)  # one is never predicted
        at_least("max_length_new", self.text.max_length_student, 2)
        self._check_prefix()
        self._check_new()
        if self.run.trust_remote_code:
            self._check_pinned()
        elif self.training.body.uses_hub_kernel:
            raise ConfigError(
                f"attn_implementation {self.training.attention} is compiled code that the hub sends, and it "
                "runs only with trust_remote_code: set that, or attn_implementation to flash_attention_2"
            )

    def _check_prefix(self) -> None:
        prefix, schedule = self.training.prefix, self.schedule
        if not prefix.prefix_steps:
            return
        left = schedule.steps - prefix.prefix_steps
        if left < max(1, schedule.warmup_steps):
            raise ConfigError(
                f"prefix_steps ({prefix.prefix_steps}) are the first of steps ({schedule.steps}), which "
                f"leaves {left} for the main stage: it needs 1, and warmup_steps ({schedule.warmup_steps})"
            )
        has_target = self.target.target_tokenizer_name is not None or self.target.tokens_to_add
        if prefix.prefix_trainable == "non_overlapping_embeddings" and not has_target:
            raise ConfigError(
                "prefix_trainable is non_overlapping_embeddings, and the student keeps its tokenizer: set "
                "target_tokenizer_name, or prefix_trainable to embeddings"
            )

    def _check_new(self) -> None:
        """What a model from nothing and packed rows go with."""
        training, named = self.training, self.teacher is not None or self.objective.needs_teacher
        if self.student.from_config is not None and training.train_model_mode != "full":
            raise ConfigError(
                f"student.from_config begins with random weights, and train_model_mode "
                f"{training.train_model_mode} leaves them so: set it to full"
            )
        if self.student.from_config is not None and self.teacher is None and named:
            raise ConfigError(
                "student.from_config begins with random weights, which teach nothing: name a teacher, or use "
                "the loss clm alone"
            )
        if self.schedule.pack and (self.text.pack_documents or self.text.group_by_length):
            raise ConfigError(
                "pack leaves no padding, which pack_documents and group_by_length save: set pack, or them"
            )
        if self.schedule.pack and (named or {*self.objective.losses} - {"clm", "sft"}):
            raise ConfigError(
                f"pack joins documents, and the losses {', '.join(self.objective.losses)} of a student and a "
                "teacher compare them one by one: use clm alone and no teacher, or set pack to false"
            )

    def _check_pinned(self) -> None:
        """Code from the hub must be a commit that somebody has read, not whatever a branch holds today."""
        sources = {"student": self.student} | ({"teacher": self.teacher} if self.teacher else {})
        for name, source in sources.items():
            is_local = Path(source.pretrained_model_name_or_path).exists()
            if not is_local and not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
                raise ConfigError(
                    f"trust_remote_code needs {name}.revision to be a 40-digit commit: got {source.revision}"
                )
