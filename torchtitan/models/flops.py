"""What a token costs: the arithmetic of a model's forward and backward."""

from torchtitan.models.decoder import DecoderConfig


def flops_per_token(config: DecoderConfig, seq_len: int) -> tuple[float, float]:
    """Forward and backward FLOPs a token, attention counted (in full, by what masks leave).

    Matrix products cost 2 FLOPs a weight forward and 4 backward, of the weights that a token meets: of
    the experts, the K it goes to. Attention's two products cost 2 a channel forward for each token that
    a token is held against: in full all L of the sequence, in every layer; by masks those before it
    that the layer's pattern lets it see, L / 2 on average without windows and chunks. Recomputation is
    not counted, nor are norms, activations and the embedding's look-up.
    """
    weights, channels = config.attention_costs()
    n_dense_layers = config.n_layers - config.n_moe_layers
    weights = config.n_layers * weights + n_dense_layers * 3 * config.dim * config.ffn_dim
    if config.n_moe_layers:
        experts = config.moe.top_k + config.moe.num_shared_experts
        router = config.dim * config.moe.num_experts
        weights += config.n_moe_layers * (router + 3 * config.dim * config.moe.ffn_dim * experts)
    weights += config.dim * config.vocab_size
    patterns = [config.attention_pattern(layer_id) for layer_id in range(config.n_layers)]
    seen = sum(pattern.mean_seen(seq_len) for pattern in patterns)
    full = config.n_layers * seq_len
    return 6.0 * (weights + channels * full), 6.0 * (weights + channels * seen)
