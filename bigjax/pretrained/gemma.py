"""Gemma 3, its text model, as `bigjax.models.Gemma`."""

import jax

from bigjax import UsageError
from bigjax.models.gemma import Gemma
from bigjax.pretrained.families import Config, Family, only
from bigjax.pretrained.names import Row

NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
TABLE: list[Row] = [
    ("model.embed_tokens", "embedding", "embedding"),
    *((f"model.layers.{{n}}.{theirs}", f"layer_{{n}}/{ours}", "norm") for theirs, ours in NORMS.items()),
    *((f"model.layers.{{n}}.self_attn.{k}_proj", f"layer_{{n}}/attention/{k}", "linear") for k in "qkvo"),
    *((f"model.layers.{{n}}.self_attn.{k}_norm", f"layer_{{n}}/attention/{k}_norm", "norm") for k in "qk"),
    *((f"model.layers.{{n}}.mlp.{k}_proj", f"layer_{{n}}/mlp/{k}", "linear") for k in ("up", "gate", "down")),
    ("model.norm", "norm", "norm"),
    ("lm_head", "unembedding", "linear"),
]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a Gemma."""
    only(c, "hidden_activation", "gelu_pytorch_tanh")
    only(c, "attention_bias", False)
    only(c, "use_bidirectional_attention", False, None)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        only(c, name, None)
    rope = c.get("rope_parameters") or {}  # of transformers 5; before it each kind had a name of its own
    far = {"rope_theta": c.get("rope_theta", 1e6)} | (rope.get("full_attention") or {}) | (c.get("rope_scaling") or {})
    near = {"rope_theta": c.get("rope_local_base_freq", 1e4)} | (rope.get("sliding_attention") or {})
    far["rope_type"] = far.get("rope_type", far.get("type", "default"))
    only(near, "rope_type", "default")
    for said in (c, near, far):
        only(said, "partial_rotary_factor", 1, None)
    return {
        "vocabulary": c.get("vocab_size", 262_208),
        "layers": c.get("num_hidden_layers", 26),
        "width": c.get("hidden_size", 2304),
        "heads": c.get("num_attention_heads", 8),
        "kv_heads": c.get("num_key_value_heads", 4),
        "head": c.get("head_dim", 256),
        "mlp": c.get("intermediate_size", 9216),
        "context": c.get("max_position_embeddings", 131_072),
        "window": c.get("sliding_window", 4096),
        "period": _period(c),
        "rope_base": float(far["rope_theta"]),
        "rope_factor": float(far["factor"]) if only(far, "rope_type", "default", "linear") == "linear" else 1.0,
        "local_rope_base": float(near["rope_theta"]),
        "query_scalar": c.get("query_pre_attn_scalar", 256),
        "epsilon": c.get("rms_norm_eps", 1e-6),
        "tied": c.get("tie_word_embeddings", True),
    }


def _types(layers: int, period: int) -> list[str]:
    return ["sliding_attention" if n % period else "full_attention" for n in range(1, layers + 1)]


def _period(c: Config) -> int:
    """Every so-manieth layer looks at everything; UsageError where those that do lie otherwise."""
    layers, said = c.get("num_hidden_layers", 26), c.get("layer_types")
    period = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    if said in (None, _types(layers, period)):
        return period
    period = said.index("full_attention") + 1 if "full_attention" in said else layers + 1
    if said != _types(layers, period):
        raise UsageError(
            "config.json's layer_types have no period, which is not known here: only every so-manieth layer can be "
            "full_attention, and all others sliding_attention"
        )
    return period


def write(model: Gemma) -> Config:
    """config.json of a Gemma."""
    scaled = {"rope_type": "linear", "factor": model.rope_factor} if model.rope_factor != 1 else {}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": model.vocabulary,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head,
        "intermediate_size": model.mlp,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": model.context,
        "sliding_window": model.window,
        "sliding_window_pattern": model.period,
        "layer_types": _types(model.layers, model.period),
        "rope_theta": model.rope_base,
        "rope_local_base_freq": model.local_rope_base,
        "rope_scaling": scaled or None,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": model.rope_base} | scaled,
            "sliding_attention": {"rope_type": "default", "rope_theta": model.local_rope_base},
        },
        "query_pre_attn_scalar": model.query_scalar or model.head,
        "rms_norm_eps": model.epsilon,
        "tie_word_embeddings": model.tied,
    }


FAMILY = Family(
    architectures=("Gemma3ForCausalLM",),
    kind=Gemma,
    read=read,
    write=write,
    table=lambda model, names: TABLE,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 1), "int32"),),
    same=(("lm_head.weight", "model.embed_tokens.weight"),),
)
