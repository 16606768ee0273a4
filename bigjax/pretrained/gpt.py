"""GPT-2 and the Llama architecture with its relatives, as `bigjax.models.GPT`."""

import jax

from bigjax import UsageError
from bigjax.models.gpt import GPT
from bigjax.pretrained.families import UNITS, Config, Family, only, unit_from, unit_to
from bigjax.pretrained.names import Row

GPT2: list[Row] = [
    ("transformer.wte", "embedding", "embedding"),
    ("transformer.wpe", "positions", "embedding"),
    ("transformer.h.{n}.ln_1", "layer_{n}/attention_norm", "norm"),
    ("transformer.h.{n}.attn.c_attn", tuple(f"layer_{{n}}/attention/{k}" for k in "qkv"), "conv1d"),
    ("transformer.h.{n}.attn.c_proj", "layer_{n}/attention/o", "conv1d"),
    ("transformer.h.{n}.ln_2", "layer_{n}/mlp_norm", "norm"),
    ("transformer.h.{n}.mlp.c_fc", "layer_{n}/mlp/up", "conv1d"),
    ("transformer.h.{n}.mlp.c_proj", "layer_{n}/mlp/down", "conv1d"),
    ("transformer.ln_f", "norm", "norm"),
    ("lm_head", "unembedding", "linear"),
]
LLAMA: list[Row] = [
    ("model.embed_tokens", "embedding", "embedding"),
    ("model.layers.{n}.input_layernorm", "layer_{n}/attention_norm", "norm"),
    *((f"model.layers.{{n}}.self_attn.{k}_proj", f"layer_{{n}}/attention/{k}", "linear") for k in "qkvo"),
    *((f"model.layers.{{n}}.self_attn.{k}_norm", f"layer_{{n}}/attention/{k}_norm", "norm") for k in "qk"),
    ("model.layers.{n}.post_attention_layernorm", "layer_{n}/mlp_norm", "norm"),
    *((f"model.layers.{{n}}.mlp.{k}_proj", f"layer_{{n}}/mlp/{k}", "linear") for k in ("up", "gate", "down")),
    ("model.norm", "norm", "norm"),
    ("lm_head", "unembedding", "linear"),
]
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read(c: Config, names: set[str]) -> Config:
    """The fields of a GPT."""
    kind = FAMILY.architecture(c)
    return _gpt2(c) if kind == "GPT2LMHeadModel" else _llama(c, kind)


def _gpt2(c: Config) -> Config:
    only(c, "scale_attn_weights", True)
    only(c, "scale_attn_by_inverse_layer_idx", False)
    only(c, "add_cross_attention", False)
    return {
        "vocabulary": c.get("vocab_size", 50257),
        "layers": c.get("n_layer", 12),
        "width": c.get("n_embd", 768),
        "heads": c.get("n_head", 12),
        "context": c.get("n_positions", 1024),
        "mlp": c.get("n_inner"),
        "activation": unit_from(c, "activation_function", "gelu_new"),
        "epsilon": c.get("layer_norm_epsilon", 1e-5),
        "tied": c.get("tie_word_embeddings", True),
        "dropout": c.get("resid_pdrop", 0.1),
    }


def _llama(c: Config, kind: str) -> Config:
    only(c, "hidden_act", "silu")
    only(c, "mlp_bias", False)
    width, heads = c.get("hidden_size", 4096), c.get("num_attention_heads", 32)
    rope = {"rope_theta": 10_000.0} | c | (c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    scaled = only(rope, "rope_type", "default", "llama3") == "llama3"
    return {
        "vocabulary": c.get("vocab_size", 32000),
        "layers": c.get("num_hidden_layers", 32),
        "width": width,
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head": c.get("head_dim") or (128 if kind == "Qwen3ForCausalLM" else width // heads),
        "context": c.get("max_position_embeddings", 2048 if kind == "LlamaForCausalLM" else 32768),
        "mlp": c.get("intermediate_size", 11008),
        "epsilon": c.get("rms_norm_eps", 1e-6),
        "tied": c.get("tie_word_embeddings", False),
        "bias": only(c, "attention_bias", False),
        "qkv_bias": kind == "Qwen2ForCausalLM" or None,
        "qk_norm": kind == "Qwen3ForCausalLM",
        "window": _window(c, kind),
        "rope_base": float(rope["rope_theta"]),
        "rope_scaling": tuple(rope[k] for k in ROPE) if scaled else None,
        **{"position": "rotary", "norm": "rms", "activation": "swiglu"},
    }


def _window(c: Config, kind: str) -> int | None:
    """The window of all layers; UsageError where only some have one."""
    window = c.get("sliding_window", 4096 if kind == "MistralForCausalLM" else None)
    if kind == "LlamaForCausalLM" or window is None:
        return None
    if kind == "MistralForCausalLM":
        return window
    layers = c.get("num_hidden_layers", 32)
    full = ["full_attention"] * (c.get("max_window_layers", 28) if c.get("use_sliding_window") else layers)
    types = c.get("layer_types") or [*full, *["sliding_attention"] * layers][:layers]
    if len(set(types)) > 1:
        raise UsageError("config.json has a sliding window in some layers only, which is not known here: all, or none")
    return window if types[0] == "sliding_attention" else None


def write(model: GPT) -> Config:
    """config.json of the architecture that a GPT is one of."""
    form = (model.position, model.norm, model.activation)
    D, H = model.width, model.heads
    if (
        form[:2] == ("learned", "layer")
        and model.activation in UNITS.values()
        and model.bias
        and (model.kv_heads or H) == H
    ):
        if model.head in (None, D // H) and not (model.qk_norm or model.window or model.qkv_bias is False):
            return {
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                **{"vocab_size": model.vocabulary, "n_layer": model.layers, "n_embd": D, "n_head": H},
                **{"n_positions": model.context, "n_inner": model.mlp, "layer_norm_epsilon": model.epsilon or 1e-5},
                **{"tie_word_embeddings": model.tied, "activation_function": unit_to(model.activation)},
                **{f"{k}_pdrop": model.dropout for k in ("resid", "embd", "attn")},
            }
    if form != ("rotary", "rms", "swiglu") or model.bias or model.dropout:
        raise UsageError(
            "this GPT is neither GPT-2 (learned, layer, gelu or relu, biases) nor Llama (rotary, rms, swiglu, neither "
            "biases nor dropout), so others have no form for it: it can be kept by bigjax alone"
        )
    parts = {"qwen2": bool(model.qkv_bias), "qwen3": model.qk_norm, "mistral": bool(model.window)}
    if sum(parts.values()) > 1:
        raise UsageError(
            f"this GPT has what sets {' and '.join(k for k, v in parts.items() if v)} apart: only one can be"
        )
    kind = next((k for k, v in parts.items() if v), "llama")
    rope = {"rope_type": "llama3", **dict(zip(ROPE, model.rope_scaling))} if model.rope_scaling else {}
    hidden = model.mlp or -(-D // 3) * 8
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{"vocab_size": model.vocabulary, "num_hidden_layers": model.layers, "hidden_size": D},
        **{"num_attention_heads": H, "num_key_value_heads": model.kv_heads or H, "head_dim": model.head or D // H},
        **{
            "max_position_embeddings": model.context,
            "intermediate_size": hidden,
            "rms_norm_eps": model.epsilon or 1e-6,
        },
        **{"tie_word_embeddings": model.tied, "hidden_act": "silu", "attention_bias": False},
        **({"sliding_window": model.window} if kind == "mistral" else {}),
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base} | rope,
    } | ({"rope_scaling": rope} if rope else {})


FAMILY = Family(
    architectures=(
        "GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    ),
    kind=GPT,
    read=read,
    write=write,
    table=lambda model, names: GPT2 if model.position == "learned" else LLAMA,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 1), "int32"),),
    ours=((r"^(wte|wpe|h|ln_f)\.", r"transformer.\1."),),  # as the first release of GPT-2's weights has them
    ignored=(r"\.attn\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
)  # fmt: skip
