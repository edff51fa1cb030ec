"""Suggestions for unknown keys: the names of other trainers, keys in another section, typos.

Knows the keys of torchtitan, litgpt, nanoGPT, Megatron, the Hugging Face Trainer and lm-eval.
Imports nothing heavy.
"""

import difflib
import re
from collections.abc import Sequence

MAX_SUGGESTIONS = 6

OTHER_NAMES = {  # key: its names elsewhere; only keys of the program are suggested
    "run.dir": "out_dir output_dir save_dir checkpoint_dir ckpt_dir log_dir logging_dir "
    "dump_folder",
    "run.name": "run_name exp_name experiment_name job_name wandb_run_name",
    "run.resume": "resume_from_checkpoint resume_from ckpt_path load_checkpoint load_path "
    "initial_load_path",
    "run.init_from": "model_name_or_path model_path pretrained pretrained_model "
    "pretrained_checkpoint finetune_from initial_checkpoint_dir",
    "run.time_limit": "max_time time_limit_minutes",
    "model.dim": "hidden_size n_embd d_model embed_dim emb_dim model_dim hidden_dim",
    "model.n_layers": "n_layer num_layers num_hidden_layers depth layers",
    "model.n_heads": "n_head num_heads num_attention_heads heads",
    "model.n_kv_heads": "n_kv_head num_kv_heads num_key_value_heads num_query_groups "
    "n_query_groups",
    "model.ffn_dim": "intermediate_size ffn_hidden_size mlp_dim hidden_dim",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layernorm_epsilon",
    "model.rope_theta": "rope_base",
    "model.tie_embeddings": "tie_word_embeddings tie_weights tied_embeddings",
    "model.max_seq_len": "max_position_embeddings",
    "tokenizer.path": "tokenizer_name tokenizer_path tokenizer_model tokenizer_dir",
    "train.max_steps": "steps iterations iters max_iters num_iters train_iters train_steps "
    "num_steps n_steps total_steps max_train_steps num_training_steps training_steps",
    "train.max_tokens": "tokens train_tokens total_tokens num_tokens n_tokens",
    "train.global_batch_size": "batch_size bs gbs train_batch_size global_bs",
    "train.micro_batch_size": "batch_size bs mbs local_batch_size device_batch_size micro_bs "
    "micro_batch per_device_train_batch_size per_device_batch_size train_micro_batch_size_per_gpu "
    "pipeline_parallel_microbatch_size num_microbatches pp_microbatches",
    "train.seq_len": "sequence_length sequence_len seq_length context_length context_len "
    "max_length max_seq_length block_size ctx_len n_ctx",
    "train.max_grad_norm": "grad_clip clip_grad clip_grad_norm grad_clip_norm gradient_clipping "
    "gradient_clip gradient_clip_val max_norm clip",
    "optim.optimizer": "optim_name optim_type optimizer_name optimizer_type",
    "optim.lr": "learning_rate max_lr peak_lr base_lr",
    "optim.weight_decay": "wd",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler lr_decay_style "
    "scheduler_type",
    "optim.schedule_steps": "lr_decay_iters lr_decay_steps decay_steps",
    "optim.decay_type": "lr_wsd_decay_style wsd_decay_style decay_style lr_decay_type",
    "optim.decay_ratio": "lr_wsd_decay_iters lr_decay_ratio cooldown_fraction",
    "optim.warmup_steps": "warmup warmup_iters lr_warmup_steps lr_warmup_iters num_warmup_steps",
    "checkpoint.interval": "save_steps save_every save_interval save_freq checkpoint_interval "
    "checkpoint_every ckpt_interval ckpt_freq save_every_n_steps checkpoint_steps",
    "checkpoint.keep_last": "save_total_limit keep_latest_k keep_last_n max_checkpoints save_top_k",
    "validation.interval": "eval_steps eval_interval eval_every eval_freq evaluation_interval "
    "validation_steps val_interval val_every val_check_interval validation_interval",
    "validation.samples": "eval_iters eval_batches eval_samples max_eval_samples val_samples "
    "limit_val_batches max_iters_eval",
    "log.interval": "log_interval logging_steps logging_interval logging_freq log_every log_freq "
    "log_steps print_every log_every_n_steps",
    "log.wandb": "wandb_project project",
    "hardware.price_per_hour": "price cost cost_per_hour gpu_price hourly_price price_per_gpu_hour",
    "devices": "num_gpus n_gpus ngpus gpus num_devices n_devices world_size",
    "parallel.devices": "num_gpus n_gpus ngpus gpus num_devices n_devices gpus_per_node nproc "
    "nproc_per_node ntasks_per_node devices_per_node",
    "parallel.num_nodes": "nodes nnodes n_nodes",
    "parallel.tp": "tp_size tensor_parallel tensor_parallel_size tensor_parallel_degree "
    "tensor_model_parallel_size",
    "parallel.cp": "cp_size context_parallel context_parallel_size context_parallel_degree",
    "parallel.pp": "pp_size pipeline_parallel pipeline_parallel_size pipeline_parallel_degree "
    "pipeline_model_parallel_size pp_stages pipeline",
    "parallel.pp_parts": "virtual_pipeline_model_parallel_size virtual_pipeline_parallel_size "
    "num_layers_per_virtual_pipeline_stage pp_chunks",
    "parallel.pp_layers": "pipeline_model_parallel_layout pipeline_parallel_split_points "
    "module_fqns_per_model_part pipeline_parallel_layers_per_stage",
    "parallel.dp_shard": "dp dp_size data_parallel_size data_parallel_shard_degree fsdp_size",
    "parallel.dp_replicate": "dp dp_size data_parallel_size data_parallel_replicate_degree",
    "parallel.compile": "torch_compile",
    "data.loader_threads": "num_workers dataloader_num_workers",
    "data.workers": "num_proc num_workers",
    "data.validation_fraction": "val_fraction val_split validation_split test_size",
    # evaluate.py, generate.py and convert.py
    "checkpoint": "model model_path model_name_or_path pretrained ckpt ckpt_path ckpt_dir "
    "checkpoint_path checkpoint_dir weights input input_dir",
    "evaluation.output": "output_path output_dir output_file out",
    "evaluation.micro_batch_size": "batch_size bs",
    "evaluation.seq_len": "max_length block_size context_length sequence_length",
    "tasks": "task benchmarks",
    "task_folder": "include_path",
    "num_fewshot": "n_shot n_shots shots fewshot",
    "max_new_tokens": "max_tokens max_length max_gen_len num_tokens n_tokens length n_predict",
    "temperature": "temp",
    "prompt": "text input",
    "prompts": "file prompt_file prompts_file input_file",
    "stop": "stop_strings stop_words stop_sequences",
    "system": "system_prompt",
    "tokenizer_path": "tokenizer tokenizer_model",
    "target": "output output_dir output_path out out_dir dest",
    "format": "to output_format target_format",
    "dtype": "torch_dtype precision",
    "file_gb": "max_shard_size",
    "parts": "tp mp model_parallel_size tensor_parallel_size",
    "overwrite": "force",
}

EXPLANATIONS = {  # names without a key: the reason and the remedy
    "epochs num_epochs num_train_epochs max_epochs n_epochs": "the length of a run is in steps or "
    "tokens; use train.max_steps=N or train.max_tokens=N",
    "grad_accum gradient_accumulation gradient_accumulation_steps gradient_accumulation_iters "
    "grad_accum_steps accumulate_grad_batches": "a data rank accumulates gradients over its part "
    "of the global batch; use train.micro_batch_size=N with train.global_batch_size=N",
    "total_batch_size batch_size_tokens": "the global batch is counted in sequences of "
    "train.seq_len tokens; use train.global_batch_size=N",
    "dtype torch_dtype mixed_precision mixed_precision_param param_dtype amp": "weights are "
    "float32 and computation is in fp32 or bf16; use precision.param=bf16, fp32 or auto",
    "bf16 bfloat16": "the format of computation has a key; use precision.param=bf16",
    "fp16 float16 half": "float16 is not supported; use precision.param=bf16",
    "tf32 allow_tf32 matmul_precision float32_matmul_precision set_float32_matmul_precision": "the "
    "precision of float32 products has a key; use precision.float32_matmul=high (TF32) or highest",
    "fp32 float32": "the format of computation has a key; use precision.param=fp32",
    "float8 use_fp8 enable_fp8": "fp8 has two scaling recipes; use precision.fp8=tensorwise or "
    "rowwise",
    "load_in_8bit load_in_4bit quantization quantize lora use_lora lora_r lora_rank peft use_peft "
    "qlora": "all weights are trained and stored unquantized; remove it",
    "warmup_ratio warmup_fraction warmup_tokens lr_warmup_fraction": "the warm-up is counted in "
    "steps; use optim.warmup_steps=N",
    "min_lr eta_min lr_min final_lr lr_end": "the final learning rate is a fraction of optim.lr; "
    "use optim.min_lr_ratio=0.1",
    "beta beta1 beta2 adam_beta1 adam_beta2 adamw_beta1 adamw_beta2 b1 b2": "both betas are one "
    "list; use 'optim.betas=[0.9,0.95]'",
    "momentum nesterov": "the optimizer is AdamW; use 'optim.betas=[0.9,0.95]'",
    "wandb_log use_wandb enable_wandb with_wandb report_to logger log_with": "each tracker has a "
    "key; use log.wandb=NAME, with the name of a project, or log.tensorboard=true",
    "wandb_entity wandb_mode": "the package wandb reads its environment variables WANDB_ENTITY "
    "and WANDB_MODE; use log.wandb=NAME for the project",
    "enable_tensorboard use_tensorboard tensorboard_dir": "TensorBoard files are written to the "
    "folder of the run; use log.tensorboard=true",
    "use_compile torch_compile_backend torch_compile_mode": "blocks are compiled with inductor; "
    "use parallel.compile=true",
    "gradient_checkpointing activation_checkpointing use_checkpoint recompute "
    "recompute_granularity grad_checkpointing activation_checkpoint_mode "
    "activation_checkpointing_mode ac_mode ac": "recomputation has levels; use "
    "parallel.activation_checkpoint=full, selective or none",
    "flash flash_attn flash_attention use_flash_attn use_flash_attention attn_implementation "
    "sdp_backend": "the fastest attention kernel of the device is selected; use "
    "model.attention=auto, sdpa, flex or varlen",
    "device cpu cuda gpu use_cuda no_cuda use_cpu": "the device type has a key; use "
    "parallel.accelerator=auto, cpu or cuda",
    "backend distributed_backend dist_backend": "the backend follows from the device (NCCL or "
    "gloo); use parallel.accelerator=auto, cpu or cuda",
    "fsdp fsdp2 use_fsdp fsdp_config zero zero_stage zero3 deepspeed ds_config deepspeed_config "
    "ddp use_ddp strategy sharding_strategy": "FSDP2 shards weights, gradients and optimizer "
    "state over parallel.dp_shard; use parallel.dp_shard=-1 for all processes, and "
    "parallel.dp_replicate=N for replicas",
    "pp_schedule pipeline_parallel_schedule pipeline_schedule": "the schedule is 1F1B, or "
    "interleaved 1F1B with several parts; use parallel.pp_parts=2",
    "ep expert_parallel_size expert_parallel_degree": "expert parallelism is not supported; use "
    "parallel.dp_shard, parallel.tp, parallel.cp or parallel.pp",
    "sp sequence_parallel_size": "sequence parallelism uses the processes of parallel.tp; use "
    "parallel.sequence_parallel=true",
    "dropout attn_dropout attention_dropout resid_pdrop bias attention_bias mlp_bias hidden_act "
    "activation_function activation": "Llama 3 has no dropout and no biases, and its activation "
    "is SwiGLU; remove it",
    "dataset datasets dataset_name dataset_path data_path data_dir data_file data_files "
    "train_data train_file train_dataset train_files train_data_path": "data are a group and the "
    "paths of its sources; use data=text data.name=NAME data.sources.text.path=PATH, or jsonl, "
    "parquet or fineweb_edu instead of text",
    "val_data val_file valid_file validation_file eval_dataset val_data_path": "validation text "
    "is held out of the sources; use data.validation_fraction=0.02",
    "model_config model_size model_type flavor config_file": "the models are files of conf/model; "
    "use model=llama3_8b",
    "config cfg config_path": "files of conf/experiment set keys such as train.max_steps; use "
    "experiment=NAME, with --config-dir DIR for a folder of files of your own",
    "local_rank rank master_addr master_port node_rank": "ranks and addresses are environment "
    "variables, set by torchrun or srun; remove it (deepspeed --no_local_rank does)",
    "do_train do_eval overwrite_output_dir": "a run trains and validates, and resumes in its "
    "folder; remove it",
    "no_shuffle shuffle": "samples are always shuffled; remove it, or use run.seed=N for another "
    "order",
    "n num_samples num_return_sequences n_samples num_completions best_of": "each prompt has one "
    "completion; use prompts=PATH with a line per completion",
    "do_sample greedy": "sampling depends on the temperature; use temperature=0 for greedy "
    "decoding",
    "num_beams beam_size": "there is no beam search; use temperature=0 for greedy decoding",
    "gpu_type gpu_name": "the GPU type is a group; use hardware=h100",
}


def explanation(keys: Sequence[str], name: str) -> str | None:
    """Return why the program has no key of this name, and what to use instead.

    Args:
        keys: The dotted keys of the program.
        name: A name of another trainer, also with a section.
    """
    sections = {key.partition(".")[0] for key in keys}
    for spelling in _spellings(name):
        for names, text in EXPLANATIONS.items():
            named = re.findall(
                r"(?<![\w.])([a-z_]+)(?:\.[\w.]+|=)", text.replace("experiment=", "")
            )
            if spelling in names.split() and sections.issuperset(named):
                return text
    return None


def named_keys(keys: Sequence[str], name: str) -> list[str]:
    """Return the keys that other trainers call so, else those of this name in any section."""
    spellings = _spellings(name)
    for spelling in spellings:
        named = [key for key, names in OTHER_NAMES.items() if spelling in names.split()]
        if found := [key for key in named if key in keys]:
            return found
    return [key for key in keys if key.rpartition(".")[2] == spellings[-1]]


def similar_keys(keys: Sequence[str], name: str) -> list[str]:
    """Return the keys whose last part contains or resembles that of a name."""
    last = _spellings(name)[-1]
    parts = dict.fromkeys(key.rpartition(".")[2] for key in keys)
    near = [part for part in parts if part.endswith(f"_{last}") or part.startswith(f"{last}_")]
    near = near or difflib.get_close_matches(last, parts, n=2, cutoff=0.75)
    return [key for key in keys if key.rpartition(".")[2] in near][:MAX_SUGGESTIONS]


def alternatives(words: Sequence[str]) -> str:
    """Return words as `a, b or c`."""
    *others, final = words
    return f"{', '.join(others)} or {final}" if others else final


def _spellings(name: str) -> tuple[str, str]:
    """Return a name in snake case: `eval.interval` as `eval_interval`, and its last part."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return snake.replace(".", "_"), snake.rpartition(".")[2]
