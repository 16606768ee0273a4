"""T5, 1.0 and 1.1, as `bigjax.models.T5`."""

import jax

from bigjax.models.t5 import T5
from bigjax.pretrained.families import Config, Family, only, renamed
from bigjax.pretrained.names import Row

FORMS = {"relu": "relu", "gated-gelu": "geglu"}
THEIRS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}  # as config.json may say it once more
OTHERS = {"hidden_size": "d_model", "num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
OTHERS |= {"head_dim": "d_kv"}


def table(model: T5, names: set[str]) -> list[Row]:
    """A layer of theirs is a sublayer."""
    rows: list[Row] = [("shared", "embedding", "embedding"), ("lm_head", "unembedding", "linear")]
    parts = {"encoder": ("attention", "mlp"), "decoder": ("attention", "cross", "mlp")}
    called = {"attention": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    dense = {"wi_0": "gate", "wi_1": "up", "wo": "down"} if model.activation == "geglu" else {"wi": "up", "wo": "down"}
    for tower, sublayers in parts.items():
        first = f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias"
        rows += [(first, f"{tower}/positions", "embedding"), (f"{tower}.final_layer_norm", f"{tower}/norm", "norm")]
        for i, part in enumerate(sublayers):
            theirs, ours = f"{tower}.block.{{n}}.layer.{i}", f"{tower}/layer_{{n}}/{part}"
            kernels = dense if part == "mlp" else dict(zip("qkvo", "qkvo"))
            rows += [(f"{theirs}.{called[part]}.{a}", f"{ours}/{b}", "linear") for a, b in kernels.items()]
            rows.append((f"{theirs}.layer_norm", f"{ours}_norm", "norm"))
    return rows


def read(c: Config, names: set[str]) -> Config:
    """The fields of a T5."""
    c = renamed(c, OTHERS)
    form = only(c, "feed_forward_proj", *FORMS)
    for name, value in zip(("dense_act_fn", "is_gated_act"), THEIRS[form]):
        only(c, name, value)
    scaled = c.get("tie_word_embeddings") is not False
    return {
        "vocabulary": c.get("vocab_size", 32128),
        "layers": (layers := c.get("num_layers", 6)),
        "decoder_layers": c.get("num_decoder_layers") or layers,
        "width": c.get("d_model", 512),
        "heads": c.get("num_heads", 8),
        "head": c.get("d_kv", 64),
        "mlp": c.get("d_ff", 2048),
        "activation": FORMS[form],
        "tied": "lm_head.weight" not in names,
        "scaled": bool(c.get("scale_decoder_outputs", scaled)),
        "buckets": c.get("relative_attention_num_buckets", 32),
        "distance": c.get("relative_attention_max_distance", 128),
        "epsilon": c.get("layer_norm_epsilon", 1e-6),
        "dropout": c.get("dropout_rate", 0.1),
    }


def write(model: T5) -> Config:
    """config.json of a T5."""
    scaled = model.tied if model.scaled is None else model.scaled
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": model.vocabulary,
        "num_layers": model.layers,
        "num_decoder_layers": model.decoder_layers or model.layers,
        "d_model": model.width,
        "num_heads": model.heads,
        "d_kv": model.head,
        "d_ff": model.mlp,
        "feed_forward_proj": next(k for k, v in FORMS.items() if v == model.activation),
        "tie_word_embeddings": scaled,  # which is how they say it
        "relative_attention_num_buckets": model.buckets,
        "relative_attention_max_distance": model.distance,
        "layer_norm_epsilon": model.epsilon,
        "dropout_rate": model.dropout,
        "decoder_start_token_id": 0,
    }


FAMILY = Family(
    architectures=("T5ForConditionalGeneration",),
    kind=T5,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 1), "int32"),) * 2,
    same=(("encoder.embed_tokens.weight", "shared.weight"), ("decoder.embed_tokens.weight", "shared.weight")),
    ignored=(r"EncDecAttention\.relative_attention_bias",),
)
