"""llama.cpp's own server, with a small Llama and adapters in its format: for `bayes_kernels.serving`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from torch import Tensor

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _place(name: str, config: Any) -> tuple[str, int]:
    """A tensor's name there, and the heads whose rows lie in another order; 0 for none."""
    if name in _WHOLE:
        return _WHOLE[name], 0
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return f"blk.{layer}.{_PARTS[part]}.weight", heads.get(part.rpartition(".")[2], 0)


def _rows(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Pairs that a rotation mixes are neighbours there, and half a head apart here."""
    if not heads:
        return weight
    parts = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(weight.shape))


def _write(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_base(model: Any, tokenizer: Any, path: Path) -> None:
    """A Llama with a tokenizer of bytes, in fp32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    kinds = [
        gguf.TokenType.CONTROL if t in ("<s>", "</s>") else gguf.TokenType.NORMAL for t in tokens
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["\u0100 \u0100"])  # some must be there; of two zero bytes none is used
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)
    state: dict[str, Tensor] = model.state_dict()
    for name, value in state.items():
        place, heads = _place(name, config)
        writer.add_tensor(place, _rows(value.float().numpy(), heads))
    _write(writer)


def write_adapter(folder: Path, config: Any, path: Path) -> None:
    """A plain LoRA folder; `config` is the base model's."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    alpha = json.loads((folder / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        name, _, factor = key.removeprefix("base_model.model.").rpartition(".lora_")
        place, heads = _place(f"{name}.weight", config)
        which, own = ("a", value) if factor.startswith("A") else ("b", _rows(value, heads))
        writer.add_tensor(f"{place}.lora_{which}", own)
    _write(writer)


@contextlib.contextmanager
def llama_cpp_server(base: Path, adapters: Sequence[Path]) -> Iterator[str]:
    """Inside, a server on a free port that has the adapters, none of them applied; its address."""
    words = "llama.cpp's server must be installed: pip install xllamacpp gguf"
    server = pytest.importorskip("xllamacpp", reason=words)
    parameters = server.CommonParams()
    parameters.model.path = str(base)
    parameters.lora_adapters = [server.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
    parameters.lora_init_without_apply = True
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 256, 2, 0
    parameters.cpuparams.n_threads = parameters.n_threads_http = 1
    parameters.flash_attn_type = server.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.warmup, parameters.verbosity = False, -1
    parameters.cache_type_k = parameters.cache_type_v = server.ggml_type.GGML_TYPE_F32
    running = server.Server(parameters)
    try:
        yield f"{running.listening_address}/v1"
    finally:
        del running
