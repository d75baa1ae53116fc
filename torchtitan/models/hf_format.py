"""How a family's config reads in Hugging Face's config.json, as tables that are played either way.

A family has a format for each `model_type` that it covers. What a format does not know is refused by
name, whether in a file of theirs or in a config of ours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from torchtitan.config.faults import ConfigError, Fault
from torchtitan.config.nested import value_at, with_value
from torchtitan.models.hf_positions import read_positions, write_scaling
from torchtitan.weight_map import Drop, OnlyOurs, Rename, Stack, Twin, WeightMap

NEEDED = object()
"""As a field's default: a file without the field is refused."""

_NEUTRAL = """_name_or_path architectures attention_dropout auto_map aux_loss_alpha bos_token_id dtype
ep_size eos_token_id id2label initializer_range label2id model_type
num_mtp_layers num_nextn_predict_layers output_router_logits pad_token_id pretraining_tp
quantization_config router_aux_loss_coef seq_aux tokenizer_class torch_dtype transformers_version
use_cache"""
"""Fields that do not change logits in evaluation mode, or that the reader of weights looks at."""

_RUNTIME = {"attn_type", "attn_mask_type", "load_balance_coeff"}
"""Fields of ours that say how a model is computed or trained, not what it is: beside what the run sets."""


@dataclass(frozen=True)
class Field:
    """A field of ours, by its dotted path, under another name and maybe in another form.

    `decode(theirs)` gives ours and raises ValueError, with the reason, for what ours cannot be.
    """

    ours: str
    default: Any = NEEDED
    """What theirs is where it is absent or null; or a function of our config, as far as it is read."""
    decode: Callable[[Any], Any] = lambda value: value
    encode: Callable[[Any], Any] = lambda value: value
    aliases: tuple[str, ...] = ()
    """Other names that files have for it."""


@dataclass(frozen=True)
class HFFormat:
    """One `model_type` of transformers: its config's fields and its tensors' names."""

    model_type: str
    architecture: str
    template: Any
    """A config of ours; it says what no field of theirs does."""
    fields: Mapping[str, Field]
    """By their name."""
    weights: WeightMap
    fixed: Mapping[str, Any]
    """Fields that ours supports with one value only, their default."""
    derived: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Fields that follow from our config: a file that has them must agree."""
    ignored: tuple[str, ...] = ()
    """Fields that mean nothing in this format."""

    def fits(self, config: Any) -> bool:
        """Whether a config of ours is of this kind, whatever its sizes."""
        template = self.template
        return type(config) is type(template) and (config.moe is None) == (template.moe is None)


def decode_config(formats: Sequence[HFFormat], theirs: Mapping[str, Any]) -> tuple[Any, HFFormat]:
    """Our config of a config.json, and the format that understood it; ConfigError if none does."""
    named = [f for f in formats if f.model_type == theirs.get("model_type")]
    if not named:
        known = ", ".join(dict.fromkeys(repr(f.model_type) for f in formats))
        reason = "no family has this architecture."
        fault = Fault("model_type", reason, f"Known: {known}.", theirs.get("model_type"))
        raise ConfigError([fault])
    return _best(named, lambda format: _decode(format, theirs))


def encode_config(formats: Sequence[HFFormat], config: Any) -> tuple[dict[str, Any], HFFormat]:
    """config.json of a config of ours and its format; ConfigError where transformers has no such model."""
    fitting = [f for f in formats if f.fits(config)]
    if not fitting:
        known = ", ".join(f.architecture for f in formats)
        raise ConfigError([Fault("model.name", "transformers has no such model.", f"Known: {known}.")])
    return _best(fitting, lambda format: _encode(format, config))


def differences(config: Any, other: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two configs of one family are not the same model: the field's path and both values."""
    if type(config) is not type(other):
        yield path, config, other
        return
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(other, field.name)
        if field.name in _RUNTIME or "set_by" in field.metadata or ours == theirs:
            continue
        inner = f"{path}.{field.name}".removeprefix(".")
        if is_dataclass(ours):
            yield from differences(ours, theirs, inner)
        else:
            yield inner, ours, theirs


def _best(
    formats: Sequence[HFFormat], attempt: Callable[[HFFormat], Any]
) -> tuple[Any, HFFormat]:
    """What the first format makes of it that does not refuse; else the refusal with the fewest faults."""
    refusals = []
    for format in formats:
        try:
            return attempt(format), format
        except ConfigError as refusal:
            refusals.append(refusal)
    raise min(refusals, key=lambda refusal: len(refusal.faults))


def _decode(format: HFFormat, theirs: Mapping[str, Any]) -> Any:
    faults: list[Fault] = []
    config, left = format.template, dict(theirs)
    for name, field in format.fields.items():
        named = next((n for n in (name, *field.aliases) if n in left), name)
        value = left.pop(named, None)
        if value is None:
            value = field.default(config) if callable(field.default) else field.default
        if value is NEEDED:
            faults.append(Fault(name, "is missing."))
            continue
        try:
            config = with_value(config, field.ours, field.decode(value))
        except ValueError as error:
            faults.append(Fault(name, f"{error}.", value=value))
    for name, value in format.fixed.items():
        if (given := left.pop(name, None)) not in (None, value):
            faults.append(Fault(name, f"only {value!r} is supported.", value=given))
    try:
        theta, scaling = read_positions(left)
        config = replace(config, rope_theta=theta, rope_scaling=scaling)
    except ValueError as error:
        faults.append(Fault("rope_parameters", f"{error}."))
    if not faults:
        for name, derive in format.derived.items():
            given, value = left.get(name), derive(config)
            if given not in (None, value):
                faults.append(Fault(name, f"only {value!r} is supported here.", value=given))
    known = {*_NEUTRAL.split(), *format.derived, *format.ignored}
    for name in left.keys() - known:
        if left[name]:  # a switch that is off, or a list of nothing, asks for nothing
            faults.append(Fault(name, "is not supported.", value=left[name]))
    if faults:
        raise ConfigError(sorted(faults, key=lambda fault: fault.setting))
    return config


def _encode(format: HFFormat, config: Any) -> dict[str, Any]:
    theirs = {"architectures": [format.architecture], "model_type": format.model_type}
    theirs |= {name: field.encode(value_at(config, field.ours)) for name, field in format.fields.items()}
    theirs |= format.fixed
    # As transformers 4 names them: 5 reads these too, and so does other software.
    theirs["rope_theta"] = config.rope_theta
    theirs["rope_scaling"] = write_scaling(config.rope_scaling)
    faults = [
        Fault(f"model.overrides.{path}", f"a {format.architecture} has {given!r}.", value=ours)
        for path, ours, given in differences(config, _decode(format, theirs))
    ]
    if faults:
        raise ConfigError(faults)
    return theirs


def leading_layers(indices: Sequence[int]) -> int:
    """How many layers [0, 1, ...] are; ValueError where others are among them."""
    if sorted(indices) != list(range(len(indices))):
        raise ValueError("only the first layers can be dense")
    return len(indices)


DECODER_FIELDS = {
    "vocab_size": Field("vocab_size"),
    "hidden_size": Field("dim"),
    "intermediate_size": Field("ffn_dim"),
    "num_hidden_layers": Field("n_layers"),
    "num_attention_heads": Field("n_heads"),
    "num_key_value_heads": Field("n_kv_heads", default=lambda config: config.n_heads),
    "rms_norm_eps": Field("norm_eps", default=1e-6),
    "max_position_embeddings": Field("max_seq_len", default=2048),
    "tie_word_embeddings": Field("enable_weight_tying", default=False),
}
"""What all families' configs have."""

DECODER_FIXED = {"hidden_act": "silu", "attention_bias": False}

_LAYER, _MLP = "model.layers.{layer}", "model.layers.{layer}.mlp"

DECODER_WEIGHTS: WeightMap = (
    Rename("tok_embeddings.weight", "model.embed_tokens.weight"),
    Rename("norm.weight", "model.norm.weight"),
    Rename("output.weight", "lm_head.weight"),
    Twin("lm_head.weight", of="model.embed_tokens.weight"),
    Rename("layers.{layer}.attention_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    Rename("layers.{layer}.ffn_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
    Rename("layers.{layer}.attention.wq.weight", f"{_LAYER}.self_attn.q_proj.weight"),
    Rename("layers.{layer}.attention.wo.weight", f"{_LAYER}.self_attn.o_proj.weight"),
    Rename("layers.{layer}.feed_forward.w1.weight", f"{_MLP}.gate_proj.weight"),
    Rename("layers.{layer}.feed_forward.w2.weight", f"{_MLP}.down_proj.weight"),
    Rename("layers.{layer}.feed_forward.w3.weight", f"{_MLP}.up_proj.weight"),
    Drop(f"{_LAYER}.self_attn.rotary_emb.inv_freq", "follows from the config"),
    OnlyOurs(
        "layers.{layer}.moe.expert_bias",
        "transformers' model has no balance bias; model.overrides.moe.load_balance_coeff = 0.0 trains none",
    ),
    OnlyOurs("layers.{layer}.moe.previous_load", "a statistic of training", must_be_zero=False),
)
"""What all families' files have."""

KEY_VALUE_WEIGHTS: WeightMap = (
    Rename("layers.{layer}.attention.wk.weight", f"{_LAYER}.self_attn.k_proj.weight"),
    Rename("layers.{layer}.attention.wv.weight", f"{_LAYER}.self_attn.v_proj.weight"),
)

EXPERT_WEIGHTS: WeightMap = (
    Rename("layers.{layer}.moe.router.gate.weight", f"{_MLP}.gate.weight"),
    Stack(
        "layers.{layer}.moe.experts.w13",
        (f"{_MLP}.experts.{{expert}}.gate_proj.weight", f"{_MLP}.experts.{{expert}}.up_proj.weight"),
    ),
    Stack("layers.{layer}.moe.experts.w2", (f"{_MLP}.experts.{{expert}}.down_proj.weight",)),
)
