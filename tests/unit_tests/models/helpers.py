"""What tests of models share: one with weights, parity with transformers, and what backward keeps."""

import torch

from torchtitan.models.init import draw, parameter_inits

CPU = torch.device("cpu")


def build(config, seed=0):
    """The config's model on the CPU with its initial weights."""
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device=CPU)
    inits = parameter_inits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            rows = torch.arange(len(parameter))
            parameter.copy_(draw(name, parameter.shape, rows, inits[name], seed, CPU))
    model.fill_buffers(CPU)
    return model


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "moe.router.gate": "mlp.gate",
    "moe.experts.w13": "mlp.experts.gate_up_proj",
    "moe.experts.w2": "mlp.experts.down_proj",
    "moe.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "moe.shared_experts.w2": "mlp.shared_experts.down_proj",
    "moe.shared_experts.w3": "mlp.shared_experts.up_proj",
}


def hf_name(name, others):
    """transformers' name of a parameter of ours; `others` are a family's own, tried first."""
    parts = {**HF_NAMES, **others}
    module, _, weight = name.rpartition(".")
    layer, _, inside = module.removeprefix("layers.").partition(".")
    if not name.startswith("layers."):
        return f"{parts[module]}.{weight}"
    whole = parts.get(f"{inside}.{weight}") or f"{parts[inside]}.{weight}"
    return f"model.layers.{layer}.{whole}"


def assert_equals_transformers(
    model, reference, vocab_size, others=None, tolerance=1e-5, as_ours=None
):
    """Same weights, same tokens: same logits, and the same gradient of every parameter.

    as_ours, by the end of their name: a view of a tensor of theirs that lies as ours does.
    """

    def view(name, theirs):
        found = [f for end, f in (as_ours or {}).items() if name.endswith(end)]
        return found[0](theirs) if found else theirs

    theirs = dict(reference.named_parameters())
    ours = {hf_name(name, others or {}): value for name, value in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in ours.items():
            if parameter.std() == 0:  # norms and biases must matter
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
            inside = view(name, theirs[name])
            inside.copy_(parameter.view_as(inside))
    tokens = torch.randint(vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    logits = reference(inputs).logits
    assert relative_error(model(inputs), logits) < tolerance

    model(inputs, labels).backward()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss.backward()
    errors = {
        name: relative_error(parameter.grad, view(name, theirs[name].grad).reshape(parameter.shape))
        for name, parameter in ours.items()
    }
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, wrong


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def saved_bytes(forward, *without):
    """Bytes of distinct storages that backward keeps, besides those of the tensors `without`."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # keeps the graph, and thus the storages, alive until they are counted
    for tensor in without:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(kept.values())
