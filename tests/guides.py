"""What users of this project type elsewhere: fields and commands of guides that they know, as facts.

A line is `field = value`, then what becomes of it: nothing, if it means the same; `-> field = value` if
it has another name or shape; `! words` of the refusal. Behind `;` is what else it needs.
"""

LLAMA = "meta-llama/Llama-3.2-3B-Instruct"
MOVED = f"{LLAMA}:source=Llama3"
TARGET = "Qwen/Qwen2.5-1.5B:source=Qwen2:target=Llama3"
GEMMA = "google/gemma-2-2b-it:source=Gemma2"

TRAIN = """
teacher.pretrained_model_name_or_path = google/gemma-2-2b-it
teacher.tokenizer_name = google/gemma-2-2b-it:source=Gemma2 ; teacher=google/gemma-2-2b-it
student.pretrained_model_name_or_path = benjamin/Llama-3.2-3B-Instruct-flax
student.tokenizer_name = meta-llama/Llama-3.2-3B-Instruct:source=Llama3
new.pretrained_model_name_or_path = Qwen/Qwen2.5-1.5B -> student.pretrained_model_name_or_path
new.tokenizer_name = Qwen/Qwen2.5-1.5B:source=Qwen2 -> student.tokenizer_name
target_tokenizer = byte -> target_tokenizer_name
target_tokenizer_name = Qwen/Qwen2.5-1.5B:source=Qwen2:target=Llama3
tokens_to_add = ["<extra_token_0>","<extra_token_1>"]
special_tokens_mode = identity
special_tokens_mode = ignore
special_tokens_mode = ignore_pad
name = gemma2_to_qwen2
output_dir = outputs/gemma2_to_qwen2
output = outputs/llama3_to_qwen2_alm -> output_dir
seed = 42
train_model_mode = lora
train_model_mode = full
train_model_mode = none
train_embeddings = true
dtype = float16
dtype = bfloat16
dtype = float32
prefix_steps = 100 ! prefix_steps is 100: set both
prefix_steps = 1000 ; n_prefix_layers=4
n_prefix_layers = 4 ; prefix_steps=1000
prefix_lr = 1e-5 -> prefix_lr = 1e-05
prefix_trainable = non_overlapping_embeddings
losses = [alm_unconstrained,alm_space,clm]
losses = [sft,alm_unconstrained]
losses = sft,alm_unconstrained,alm_latents
losses = [alm_greedy]
losses = [alm_unbiased] ; tokenizer_pair_data_path=FOLDER
losses = [alm_unbiased] ! make one with `tokenkit pair-stats`
losses = [alm_side_path]
losses = [baseline_dskd]
losses = [baseline_uld]
losses = [baseline_minED] ; mined_mapping_path=FOLDER
losses = [baseline_mined] ; mined_mapping_path=FOLDER
losses = [baseline_mined] ! make one with `tokenkit mined-mapping`
losses = [custom_loss] ! is no loss
losses = [own_module:custom_loss]
loss_weights = [0.8,0.2] ; losses=[alm_unconstrained,clm]
loss_weight_mode = uncertainty
uncertainty_s_init = 0.2
loss_schedules = {alm_space: "linear(0,1,1000)", clm: constant(1)} ; losses=[alm_space,clm]
multitask_aggregation_fn = approx_gradmag_preserve_mag
alm_diff_fn = abs
alm_diff_fn = binary_ce
alm_diff_fn = reverse_binary_kl
alm_mode = append_space
alm_mode = merge_by_space_prob
alm_mode = merge_by_space_prob+append_space
alm_mode = eos_as_space ! alone changes nothing
alm_mode = eos_as_space+append_space
distill_chunk_sizes = [1]
distill_chunk_sizes = [1,2,4]
distill_main_path_numerator = chunk_count
distill_main_path_denominator = chunk_count
tokenizer_pair_data_path = FOLDER
tokenizer_pair_bias_threshold = 0.1
tokenizer_pair_bias_threshold_side_path = 1e-3 -> tokenizer_pair_bias_threshold_side_path = 0.001
side_path_mapping_mode = bias_threshold ; tokenizer_pair_data_path=FOLDER losses=[alm_side_path]
side_path_distance_fn = kl
mined_mapping_path = FOLDER/mapping.pt -> mined_mapping_path = FOLDER/mapping.npy
latents_do_project = true
baseline.divergence = srkl
baseline.divergence = kl
baseline.divergence = js
baseline.teacher_temperature = 1.0
baseline.dskd_use_causal_attention_mask = true
baseline.kd_rate = 0.5 ; losses=[baseline_uld]
baseline.kd_temp = 2.0
baseline.skew_lambda = 0.1
max_length_teacher = 1024
max_length_new = 1024
pad_to_multiple_of = 64
use_chat_template = false
steps = 1000
batch_size = 64
gradient_accumulation_steps = 1
optimizer.grad_acc_steps = 8 -> gradient_accumulation_steps
warmup_steps = 100
optimizer.warmup_steps = 1000 -> warmup_steps
eval_interval = 100
save_interval = 200
logging_interval = 10
optimizer.name = adamw
optimizer.learning_rate = 1e-4 -> optimizer.learning_rate = 0.0001
optimizer.weight_decay = 0.01
optimizer.beta1 = 0.9
optimizer.beta2 = 0.999
optimizer.epsilon = 1e-8 -> optimizer.epsilon = 1e-08
optimizer.lr_scheduler_type = cosine
optimizer.lr_scheduler_type = linear
optimizer.schedule = linear_warmup_cosine_decay
optimizer.lr_min_ratio = 0.1
optimizer.max_grad_norm = 1.0
optimizer.use_fused_adam = true
optimizer.param_groups = [{pattern: .*embeddings.*, lr_scale: 0.1}, {pattern: .*lm_head.*, lr_scale: 2.0}]
data.dataset_name = Anthropic/tulu-v3-sft-mixtures
data.dataset_config_name = default
data.split = train
data.batch_size = 64 -> batch_size
data.num_workers = 16
use_distributed = true
distributed_backend = nccl
distributed_backend = gloo
n_data_parallel = 8
n_model_parallel = 1
n_model_parallel = 8 ! its feature comes with vocabulary-parallel heads
model_lora_rank = 64
model_lora_r = 8 -> model_lora_rank
model_lora_alpha = 16 -> model_lora_alpha = 16.0
model_lora_dropout = 0.05
model_lora_targets = ["q_proj","k_proj","v_proj","o_proj","gate_proj"]
model_lora_modules_to_save = [embed_tokens,lm_head]
model_lora_target_regex = .*attention.*_proj
model_lora_layers = ["0-8","20-32"] -> model_lora_layers = 0-8,20-32
hypernet.architecture = identity
hypernet.architecture = linear
hypernet.architecture = mlp
hypernet.architecture = transformer
hypernet.num_layers = 3
hypernet.residual = true
hypernet.residual_alpha = 0.8
hypernet.use_attention = true
gradient_checkpointing = true
use_flash_attention = true ; dtype=bfloat16
expand_input_ids = true ; target_tokenizer_name=byte
output_embeddings_mode = untie
eval.tasks = [arc_easy,piqa]
data.datasets = [{name: c4, path: allenai/c4, subset: en, split: train, streaming: true}] ; data=null
data.datasets = [{path: a.jsonl, format: json, text_field: text, weight: 0.4}] ; data=null
data.datasets = [{path: a, text_template: "{instruction} {output}", weight: 0.7}] ; data=null
"""

LM_TRAINER = """
model_config: hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size
    max_position_embeddings initializer_range layer_norm_eps use_peer peer_start_layer
    peer_config.num_experts peer_config.num_experts_per_tok peer_config.num_heads
    peer_config.expert_hidden_size peer_config.product_key_dim peer_config.query_dim
    peer_config.batch_norm_query peer_config.log_expert_usage peer_config.log_freq
    peer_config.usage_threshold mla_config.q_lora_rank mla_config.kv_lora_rank mla_config.qk_rope_head_dim
    mla_config.v_head_dim mla_config.qk_nope_head_dim mla_config.rope_theta
train_config: output_dir per_device_train_batch_size per_device_eval_batch_size
    gradient_accumulation_steps learning_rate weight_decay max_grad_norm max_steps num_train_epochs
    steps_per_epoch lr_scheduler_type warmup_ratio log_level logging_steps save_steps eval_steps seed fp16
    bf16 tf32 resume_from_checkpoint
dataset_config: datasets tokenizer_name max_seq_length
eval_config: evals_registry_path evals eval_batch_size
wandb_config: project entity name log_model
data_mixes: mix.name mix.datasets
"""
"""Fields of `tokenkit pretrain`, which `tokenkit train` has not: refused there, each with the
field that says it here, or with what there is."""

LM_WORDS = """
train_config.learning_rate = it is optimizer.learning_rate
train_config.per_device_train_batch_size = it is batch_size
train_config.max_steps = it is steps
train_config.save_steps = it is save_interval
train_config.output_dir = it is output_dir
train_config.fp16 = the fields of tokenkit train are
model_config.hidden_size = starts from a model
model_config.peer_config.num_experts = starts from a model
dataset_config.max_seq_length = it is max_length_new
dataset_config.datasets = it is data.datasets
eval_config.evals = measured with ppl_eval_data
wandb_config.project = it is wandb.project
data_mixes.mix.name = name one mix as data.datasets
"""

ZETT = """
model.pretrained_model_name_or_path = meta-llama/Llama-3-8B
model.tokenizer_name = meta-llama/Llama-3-8B:source=Llama3
source_model.pretrained_model_name_or_path = meta-llama/Llama-3-8B -> model.pretrained_model_name_or_path
target_tokenizer_name = Qwen/Qwen2.5-1.5B:source=Qwen2:target=Llama3
extend_output_embeddings = true
clone_all_layers = false
combine_output_embed_with_input = true
convert_bos_eos = true
convert_by_special = true
convert_by_matching = true
output = outputs/llama3_to_qwen2
"""

EVAL_LOCKSTEP = """
models = [{pretrained_model_name_or_path: org/a, tokenizer_name: "org/a:source=Qwen2"}, org/b]
models = [org/a, org/b]
combine_strategy = mean_prob
combine_strategy = mean_logits
baseline_mined_mapping_paths = [null, FOLDER]
text = stories.txt
eval.tasks = [arc_easy, piqa]
eval.add_bos = true
eval.chat_template_mode = surround_instruct
"""

PAIR_STATS = """
teacher_tokenizer_name = google/gemma-2-2b-it:source=Gemma2
target_tokenizer_name = Qwen/Qwen2.5-1.5B:source=Qwen2:target=Gemma2
teacher_subsample_percent = 0.1
student_subsample_percent = 0.1
additive_smoothing_constant = 1e-10
data.dataset_name = Anthropic/tulu-v3-sft-mixtures
data.dataset_config_name = default
data.split = train
data.batch_size = 32
data.num_workers = 4
output = outputs/tokenizer_data/gemma2_to_qwen2
"""

MINED_MAPPING = """
teacher_tokenizer_name = google/gemma-2-2b-it:source=Gemma2
target_tokenizer_name = Qwen/Qwen2.5-1.5B:source=Qwen2:target=Gemma2
num_workers = 8
output = outputs/tokenizer_data/gemma2_to_qwen2_mined
"""

EVAL = """
model.pretrained_model_name_or_path = outputs/gemma2_to_qwen2 -> models = outputs/gemma2_to_qwen2
model.tokenizer_name = org/model:source=Qwen2 -> tokenizer_name
expand_model.pretrained_model_name_or_path = org/model -> base_model
expand_model.tokenizer_name = org/model:source=Llama3 -> base_tokenizer
tasks = [wikitext,piqa,hellaswag,lambada_openai]
max_samples = 100 -> limit
temperature = 0.0
num_beams = 1
max_new_tokens = 100
device = cuda
batch_size = 16
max_length = 1024
chat_template_mode = surround_instruct
add_bos = true
output = outputs/gemma2_to_qwen2/eval
"""

MOVE = (
    f'+student.pretrained_model_name_or_path="benjamin/Llama-3.2-3B-Instruct-flax" '
    f"+student.tokenizer_name='{MOVED}' +target_tokenizer_name='{TARGET}' "
    "tokenizer_pair_data_path='outputs/tokenizer_data/llama3_to_qwen2'"
)
PAIR = f"teacher_tokenizer_name='{MOVED}' target_tokenizer_name='{TARGET}'"
CONFIG = "configs/cross_tokenizer_distill.yaml"

COMMANDS = f"""
cross_tokenizer_distill

cross_tokenizer_distill teacher.pretrained_model_name_or_path=google/gemma-2-7b-it train_model_mode=full
    data.batch_size=64 output_dir=outputs/gemma2_7b_to_qwen2
    => batch_size=64 train_model_mode=full

cross_tokenizer_distill --config-name=cross_tokenizer_distill --config-path=configs +models=llama_qwen
    +optimizer=adamw +data=tulu3
    => student.pretrained_model_name_or_path={LLAMA} optimizer.beta2=0.95

cross_tokenizer_distill dtype=bfloat16 optimizer.use_fused_adam=true use_flash_attention=true
    => use_flash_attention=true

cross_tokenizer_distill hypernet.architecture=transformer hypernet.num_layers=2 hypernet.use_attention=true
    latents_do_project=true
    => hypernet.num_layers=2

cross_tokenizer_distill train_embeddings=true train_model_mode=none steps=1000
    output_dir=outputs/stage1_embeddings
    => steps=1000

cross_tokenizer_distill train_embeddings=false train_model_mode=lora steps=5000
    +student.pretrained_model_name_or_path=outputs/stage1_embeddings output_dir=outputs/stage2_full
    => student.pretrained_model_name_or_path=outputs/stage1_embeddings

cross_tokenizer_distill losses=[alm_unbiased] alm_diff_fn=binary_ce output=outputs/llama3_to_qwen2_alm {MOVE}
    => output_dir=outputs/llama3_to_qwen2_alm target_tokenizer_name={TARGET}

cross_tokenizer_distill losses=[alm_side_path] side_path_mapping_mode=bias_threshold side_path_distance_fn=kl
    tokenizer_pair_bias_threshold_side_path=1e-3 {MOVE}
    => side_path_distance_fn=kl

cross_tokenizer_distill losses=[baseline_mined] baseline.divergence=srkl baseline.teacher_temperature=1.0
    mined_mapping_path='outputs/tokenizer_data/llama3_to_qwen2_mined/mapping.pt' {MOVE}
    => mined_mapping_path=outputs/tokenizer_data/llama3_to_qwen2_mined/mapping.npy

cross_tokenizer_distill losses=[baseline_dskd] baseline.dskd_use_causal_attention_mask=true {MOVE}
    => losses=[baseline_dskd]

cross_tokenizer_distill losses=[alm_unbiased,clm] loss_weights=[0.8,0.2] alm_diff_fn=binary_ce {MOVE}
    => loss_weights=[0.8,0.2]

cross_tokenizer_distill --config={CONFIG} --overrides losses=[sft,alm_unconstrained]
    alm_mode=merge_by_space_prob+append_space tokenizer_pair_bias_threshold=0.1 train_model_mode=lora
    model_lora_rank=64 model_lora_alpha=64 n_data_parallel=1 n_model_parallel=1 steps=5000 eval_interval=1000
    save_interval=1000 data.batch_size=64 optimizer.grad_acc_steps=4 data.num_workers=16
    student.pretrained_model_name_or_path=benjamin/Llama-3.2-3B-Instruct-flax
    student.tokenizer_name=\\'{MOVED}\\' target_tokenizer_name=\\'{TARGET}\\' name=mine
    => batch_size=64 gradient_accumulation_steps=4 student.tokenizer_name={MOVED} name=mine

cross_tokenizer_distill losses=[sft,alm_unconstrained,alm_latents] train_model_mode=full expand_input_ids=true
    output_embeddings_mode=untie target_tokenizer_name=\\'{MOVED}:conversion=byte\\'
    multitask_aggregation_fn=approx_gradmag_preserve_mag hypernet.architecture=identity
    => target_tokenizer_name={MOVED}:conversion=byte

compute_mined_mapping {PAIR} output='outputs/mined'
    => output=outputs/mined

compute_tokenizer_info {PAIR} output='outputs/pair'
    => target_tokenizer_name={TARGET}

export_model model_path=outputs/my_model output_path=exported/my_model format=huggingface
    => checkpoint_path=outputs/my_model output=exported/my_model

export_checkpoint --checkpoint_path=outputs/x/step_5000 --output=checkpoints/x --with_pt
    --expand_input_ids_model=org/model --expand_input_ids_tokenizer=org/model:source=Llama3
    => checkpoint_path=outputs/x/step_5000 base_model=org/model base_tokenizer=org/model:source=Llama3

export_to_onnx model_path=outputs/my_model output_path=outputs/my_model.onnx dynamic_axes=true
    => checkpoint_path=outputs/my_model output=outputs/my_model.onnx format=onnx

optimize_for_inference model_path=outputs/my_model output_path=outputs/y quantization=int8 device=cuda
    => checkpoint_path=outputs/my_model output=outputs/y format=int8

zett --config zett model.pretrained_model_name_or_path={LLAMA}
    => method=fvt

eval model.pretrained_model_name_or_path=org/moved tasks=[arc_easy,arc_challenge,piqa,hellaswag,boolq]
    output=outputs/llama3_to_qwen2/eval
    => models=org/moved tasks=[arc_easy,arc_challenge,piqa,hellaswag,boolq]

eval --config eval max_samples=100
    => limit=100 batch_size=16
"""
"""A command, and behind `=>` some of the values that it must come to."""

ABSENT = """
push_flax_version_to_hub --model outputs/x
"""
