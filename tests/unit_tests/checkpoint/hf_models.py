"""Small transformers models, one entry a kind: what every test of Hugging Face folders runs on."""

import torch
import transformers as hf

SIZES = {
    "vocab_size": 54,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 16,
}
QWEN3_MOE = {
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "rope_parameters": YARN,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
LLAMA4 = EXPERTS | {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 40,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 5,
    "floor_scale": 4,
}
MODELS = {
    "llama3": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    "llama3, tied": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama3, long": (hf.LlamaForCausalLM, hf.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {"head_dim": 16}),
    "qwen3, tied": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3_moe": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, QWEN3_MOE),
    "qwen3_moe, a dense layer": (
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        QWEN3_MOE | {"mlp_only_layers": [0]},
    ),
    "deepseek_v3": (hf.DeepseekV3ForCausalLM, hf.DeepseekV3Config, DEEPSEEK),
    "deepseek_v3, latent queries": (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        DEEPSEEK | {"q_lora_rank": 12},
    ),
    "deepseek_v2": (
        hf.DeepseekV2ForCausalLM,
        hf.DeepseekV2Config,
        DEEPSEEK | {"topk_method": "greedy", "n_group": 1},
    ),
    "deepseek_v2, groups": (
        hf.DeepseekV2ForCausalLM,
        hf.DeepseekV2Config,
        DEEPSEEK | {"topk_method": "group_limited_greedy"},
    ),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, EXPERTS),
    "gpt_oss": (hf.GptOssForCausalLM, hf.GptOssConfig, EXPERTS | {"sliding_window": 5}),
    "llama4": (hf.Llama4ForCausalLM, hf.Llama4TextConfig, LLAMA4),
    "llama4, dense layers": (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig,
        LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False},
    ),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, {"pad_token_id": None}),
}
"""Model class, config class, and the fields that differ from `SIZES`."""


def reference(name, **changes):
    """A transformers model in fp32 with random weights: no two alike, no norm that does nothing."""
    model, config, fields = MODELS[name]
    torch.manual_seed(0)
    model = model(config(**SIZES | fields | changes)).eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *_saved_buffers(model)):
            tensor.normal_(mean=tensor.mean().item(), std=0.1)
    return model


def _saved_buffers(model):
    saved = model.state_dict()
    return [buffer for name, buffer in model.named_buffers() if name in saved]
