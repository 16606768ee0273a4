"""GPT-2 and the Llama architecture with its relatives, as `bigjax.models.GPT`."""

import jax

from bigjax import UsageError
from bigjax.models.gpt import GPT
from bigjax.pretrained.families import UNITS, Config, Family, only, renamed, rotary, unit_from, unit_to
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
TYPES = ("full_attention", "sliding_attention")
OTHERS = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
OTHERS |= {"max_position_embeddings": "n_positions"}
ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read(c: Config, names: set[str]) -> Config:
    """The fields of a GPT."""
    kind = FAMILY.architecture(c)
    return _gpt2(c) if kind == "GPT2LMHeadModel" else _llama(c, kind)


def _gpt2(c: Config) -> Config:
    c = renamed(c, OTHERS)
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
    width, heads = c.get("hidden_size", 4096), c.get("num_attention_heads", 32)
    context = c.get("max_position_embeddings", 2048 if kind == "LlamaForCausalLM" else 32768)
    rope = {ROPE[3]: context} | rotary(c, 10_000.0, "default", "linear", "llama3")
    rope |= {ROPE[3]: c[ROPE[3]]} if c.get(ROPE[3]) else {}
    names = {"default": (), "linear": ROPE[:1], "llama3": ROPE}[rope["rope_type"]]
    biased = kind in ("LlamaForCausalLM", "Qwen3ForCausalLM") and c.get("attention_bias", False)
    window, windowed = _window(c, kind)
    return {
        "vocabulary": c.get("vocab_size", 32000),
        "layers": c.get("num_hidden_layers", 32),
        "width": width,
        "heads": heads,
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head": c.get("head_dim") or (128 if kind == "Qwen3ForCausalLM" else width // heads),
        "context": context,
        "mlp": c.get("intermediate_size", 11008),
        "epsilon": c.get("rms_norm_eps", 1e-6),
        "tied": c.get("tie_word_embeddings", False),
        "bias": biased,
        "qkv_bias": kind == "Qwen2ForCausalLM" or None,
        "mlp_bias": kind == "LlamaForCausalLM" and c.get("mlp_bias", False),
        "qk_norm": kind == "Qwen3ForCausalLM",
        "window": window,
        "windowed": windowed,
        "rope_base": float(rope["rope_theta"]),
        "rope_scaling": tuple(rope[k] for k in names) or None,
        **{"position": "rotary", "norm": "rms", "activation": "swiglu"},
    }


def _window(c: Config, kind: str) -> tuple[int | None, tuple[bool, ...] | None]:
    """(the window, which layers have it; None for all)."""
    window = c.get("sliding_window", 4096 if kind == "MistralForCausalLM" else None)
    if kind == "LlamaForCausalLM" or window is None or (kind.startswith("Qwen") and not c.get("use_sliding_window")):
        return None, None
    if kind == "MistralForCausalLM":
        return window, None
    layers, full = c.get("num_hidden_layers", 32), c.get("max_window_layers", 28)
    types = c.get("layer_types") or [*[TYPES[0]] * full, *[TYPES[1]] * layers][:layers]
    windowed = tuple(only({"layer_types": t}, "layer_types", *TYPES) == TYPES[1] for t in types)
    return (window if any(windowed) else None), (windowed if len(set(windowed)) > 1 else None)


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
        if model.head in (None, D // H) and not (
            model.qk_norm or model.window or model.qkv_bias is False or model.mlp_bias is False
        ):
            return {
                "architectures": ["GPT2LMHeadModel"],
                "model_type": "gpt2",
                **{"vocab_size": model.vocabulary, "n_layer": model.layers, "n_embd": D, "n_head": H},
                **{"n_positions": model.context, "n_inner": model.mlp, "layer_norm_epsilon": model.epsilon or 1e-5},
                **{"tie_word_embeddings": model.tied, "activation_function": unit_to(model.activation)},
                **{f"{k}_pdrop": model.dropout for k in ("resid", "embd", "attn")},
            }
    if form != ("rotary", "rms", "swiglu") or model.dropout:
        raise UsageError(
            "this GPT is neither GPT-2 (learned, layer, gelu or relu, biases) nor Llama (rotary, rms, swiglu, no "
            "dropout), so others have no form for it: it can be kept by bigjax alone"
        )
    qkv = model.bias if model.qkv_bias is None else model.qkv_bias
    mlp_bias = model.bias if model.mlp_bias is None else model.mlp_bias
    forms = {
        "llama": qkv == model.bias and not (model.qk_norm or model.window),
        "mistral": model.window and not (qkv or model.bias or mlp_bias or model.qk_norm or model.windowed),
        "qwen2": qkv and not (model.bias or mlp_bias or model.qk_norm),
        "qwen3": model.qk_norm and qkv == model.bias and not mlp_bias,
    }
    kind = next((k for k, fits in forms.items() if fits), None)
    if kind is None:
        raise UsageError(
            "this GPT has parts that no one architecture has together: Llama has biases in attention, in the mlp or "
            "both; Mistral a window; Qwen2 biases in q, k and v, Qwen3 norms of q and k, and these two windows"
        )
    named = {0: {}, 1: {"rope_type": "linear"}, 4: {"rope_type": "llama3"}}[len(model.rope_scaling or ())]
    rope = named | dict(zip(ROPE, model.rope_scaling or ()))
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
        **{"tie_word_embeddings": model.tied, "hidden_act": "silu"},
        **{"attention_bias": model.bias, "mlp_bias": mlp_bias},
        **(_windows(model, kind) if model.window else {}),
        "rope_theta": model.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base} | rope,
    } | ({"rope_scaling": rope} if rope else {})


def _windows(model: GPT, kind: str) -> Config:
    """What config.json says of them."""
    if kind == "mistral":
        return {"sliding_window": model.window}
    windowed = model.windowed or (True,) * model.layers
    first = {"use_sliding_window": True, "max_window_layers": (*windowed, True).index(True)}
    return {"sliding_window": model.window, "layer_types": [TYPES[w] for w in windowed], **first}


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
    same=(("lm_head.weight", "transformer.wte.weight"), ("lm_head.weight", "model.embed_tokens.weight")),
    ignored=(r"\.attn\.(masked_)?bias$", r"\.rotary_emb\.inv_freq$"),
)  # fmt: skip
