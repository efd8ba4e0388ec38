"""Run by an interpreter that has TRL 0.11.4 (never by ours): makes and reads checkpoints with TRL's own class.

python trl_side.py save FOLDER      write a tiny GPT-2 with value head; `golden/` beside this file came from it
python trl_side.py load FOLDER OUT  load FOLDER with a value head and write all tensors TRL then holds to OUT
python trl_side.py step FOLDER OUT  load model and tokenizer from FOLDER, make one PPO step, save to the folder OUT
"""

import logging
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer


def save(folder: str) -> None:
    torch.manual_seed(7)
    config = GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GPT2LMHeadModel(config), v_head_init_strategy="normal")
    torch.nn.init.constant_(model.v_head.summary.bias, 0.25)
    model.save_pretrained(folder)


def load(folder: str, out: str) -> None:
    complaints: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: complaints.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    if any("no v_head weight is found" in complaint for complaint in complaints):
        raise SystemExit("TRL found no value head")
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, out)


def step(folder: str, out: str) -> None:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = PPOTrainer(PPOConfig(batch_size=1, mini_batch_size=1), model, None, tokenizer)
    query, response = (torch.tensor(tokenizer(text).input_ids) for text in ("hello ", "world"))
    trainer.step([query], [response], [torch.tensor(1.0)])
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    {"save": save, "load": load, "step": step}[sys.argv[1]](*sys.argv[2:])
