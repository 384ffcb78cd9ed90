"""A umT5 of two layers with the host's vocabulary, and the names of its tensors."""

from __future__ import annotations

from pathlib import Path

import comfy.text_encoders
import torch

from wanquant.quant import open_gguf

SPIECE = Path(comfy.text_encoders.__path__[0]) / "t5_pile_tokenizer" / "tokenizer.model"
CONFIG = {
    **{"d_ff": 512, "d_kv": 64, "d_model": 256, "num_heads": 4, "num_layers": 2, "vocab_size": 32128},
    **{"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "layer_norm_epsilon": 1e-6, "model_type": "umt5"},
}
# (Transformers' name, llama.cpp's)
NAMES = (
    ("shared", "token_embd"),
    ("encoder.final_layer_norm", "enc.output_norm"),
    *(
        (f"encoder.block.{n}.layer.{theirs}", f"enc.blk.{n}.{llama}")
        for n in range(2)
        for theirs, llama in (
            *((f"0.SelfAttention.{letter}", f"attn_{letter}") for letter in "qkvo"),
            ("0.SelfAttention.relative_attention_bias", "attn_rel_b"),
            ("0.layer_norm", "attn_norm"),
            ("1.DenseReluDense.wi_0", "ffn_gate"),
            ("1.DenseReluDense.wi_1", "ffn_up"),
            ("1.DenseReluDense.wo", "ffn_down"),
            ("1.layer_norm", "ffn_norm"),
        )
    ),
)


def check_values(path, state):
    tensors = open_gguf(path).tensors
    assert tensors.keys() == {f"{llama}.weight" for _, llama in NAMES}
    for theirs, llama in NAMES:
        assert torch.equal(tensors[f"{llama}.weight"].dequantize(), state[f"{theirs}.weight"].float())


def in_float32(state):
    return {name: value.float() for name, value in state.items()}
