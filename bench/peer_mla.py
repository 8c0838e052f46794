"""Language models from nothing on TinyStories: a dense MLP, PEER with 2-D and with 3-D keys, each with MLA.

    python bench/peer_mla.py FOLDER [STEPS [RATE ...]]    # prints a row for each; FOLDER must be vacant

All three have about as many parameters that a token meets, see the same tokens in the same order, and are
measured on the same held-out text. Text and tokenizer come from the folder that `TOKENKIT_DATA` names.
"""

import json
import os
import sys
import time
from pathlib import Path

from tokenkit.commands.pretrain import main

DATA = Path(os.environ.get("TOKENKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
MODEL = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 10048,
    "max_position_embeddings": 128, "peer_start_layer": 1,
    "mla_config": {
        "q_lora_rank": None, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "qk_nope_head_dim": 32,
    },
}  # fmt: skip
PEER = {
    "num_experts": 4096, "num_experts_per_tok": 8, "num_heads": 4, "log_expert_usage": True, "log_freq": 20,
}  # fmt: skip
MODELS = {  # of a token: 27 thousand parameters in each such layer
    "dense": {"use_peer": False, "intermediate_size": 104},
    "peer_2d": {
        "intermediate_size": 104, "peer_config": {**PEER, "product_key_dim": [64, 64], "query_dim": 32},
    },
    "peer_3d": {
        "intermediate_size": 104, "peer_config": {**PEER, "product_key_dim": [16, 16, 16], "query_dim": 36},
    },
}  # fmt: skip


def run(name: str, folder: Path, steps: int, rate: float) -> dict[str, object]:
    """Train one model and return its row."""
    import yaml

    folder = folder / f"{rate:g}"
    folder.mkdir(exist_ok=True)
    text = str(DATA / "text/tinystories.train.txt")
    given = {
        "model_config": MODEL | MODELS[name],
        "train_config": {
            "output_dir": str(folder / name), "per_device_train_batch_size": 16, "learning_rate": rate,
            "max_steps": steps, "warmup_ratio": 0.1, "logging_steps": 20, "save_steps": steps,
            "eval_steps": steps, "seed": 0,
        },
        "dataset_config": {
            "datasets": [{"path": text, "streaming": True}], "max_seq_length": 128, "heldout_documents": 50,
            "tokenizer_name": str(DATA / "tokenizers/tinystories10k"), "heldout_fraction": 0.01,
        },
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    began = time.perf_counter(), time.process_time()
    assert main(["--config", str(folder / f"{name}.yaml")]) == 0
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    bits = [line["bits_per_byte/student"] for line in lines if "bits_per_byte/student" in line]
    usage: dict[str, float] = {}
    for line in lines:
        usage |= {key: value for key, value in line.items() if key.startswith("experts/")}
    return {
        "model": name, "rate": rate, "bits per byte": round(bits[-1], 4), "before": round(bits[0], 4),
        "seconds": round(wall), "cpu seconds": round(cpu),
        "coverage": [round(v, 3) for k, v in sorted(usage.items()) if k.endswith("usage_coverage")],
        "unevenness": [round(v, 3) for k, v in sorted(usage.items()) if k.endswith("unevenness")],
    }  # fmt: skip


if __name__ == "__main__":
    target, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 150
    target.mkdir(parents=True)
    for rate in map(float, sys.argv[3:] or ["3e-3"]):
        for name in MODELS:
            print(json.dumps(run(name, target, steps, rate)), flush=True)
