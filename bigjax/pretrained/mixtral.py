"""Mixtral, as `bigjax.models.Mixtral`."""

import jax

from bigjax.models.mixtral import Mixtral
from bigjax.pretrained.families import Config, Family, only, renamed, rotary
from bigjax.pretrained.names import Row

EXPERTS = {"w1": "gate", "w2": "down", "w3": "up"}
TABLE: list[Row] = [
    ("model.embed_tokens", "embedding", "embedding"),
    ("model.layers.{n}.input_layernorm", "layer_{n}/attention_norm", "norm"),
    *((f"model.layers.{{n}}.self_attn.{k}_proj", f"layer_{{n}}/attention/{k}", "linear") for k in "qkvo"),
    ("model.layers.{n}.post_attention_layernorm", "layer_{n}/mlp_norm", "norm"),
    ("model.layers.{n}.block_sparse_moe.gate", "layer_{n}/router", "linear"),
    *(
        (f"model.layers.{{n}}.block_sparse_moe.experts.{{e}}.{theirs}", f"layer_{{n}}/experts/{ours}", "linear")
        for theirs, ours in EXPERTS.items()
    ),
    ("model.norm", "norm", "norm"),
    ("lm_head", "unembedding", "linear"),
]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a Mixtral."""
    c = renamed(c, {"num_experts": "num_local_experts"})
    only(c, "hidden_act", "silu")
    return {
        "vocabulary": c.get("vocab_size", 32_000),
        "layers": c.get("num_hidden_layers", 32),
        "width": c.get("hidden_size", 4096),
        "heads": (heads := c.get("num_attention_heads", 32)),
        "kv_heads": c.get("num_key_value_heads", 8) or heads,
        "head": c.get("head_dim"),
        "experts": c.get("num_local_experts", 8),
        "chosen": c.get("num_experts_per_tok", 2),
        "mlp": c.get("intermediate_size", 14_336),
        "context": c.get("max_position_embeddings", 131_072),
        "window": c.get("sliding_window"),
        "rope_base": float(rotary(c, 1e6, "default")["rope_theta"]),
        "epsilon": c.get("rms_norm_eps", 1e-5),
        "tied": c.get("tie_word_embeddings", False),
    }


def write(model: Mixtral) -> Config:
    """config.json of a Mixtral."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": model.vocabulary,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head,
        "num_local_experts": model.experts,
        "num_experts_per_tok": model.chosen,
        "intermediate_size": model.mlp,
        "hidden_act": "silu",
        "max_position_embeddings": model.context,
        "sliding_window": model.window,
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "rms_norm_eps": model.epsilon,
        "tie_word_embeddings": model.tied,
    }


FAMILY = Family(
    architectures=("MixtralForCausalLM",),
    kind=Mixtral,
    read=read,
    write=write,
    table=lambda model, names: TABLE,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 1), "int32"),),
    same=(("lm_head.weight", "model.embed_tokens.weight"),),
)
