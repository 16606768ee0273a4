"""ViT and DeiT, as `bigjax.models.ViT`: by the names of transformers, and ViT by timm's."""

import re

import jax

from bigjax import UsageError
from bigjax.models.vit import ViT
from bigjax.pretrained.families import Config, Family, labels, labels_of, only, unit_from, unit_to
from bigjax.pretrained.names import Row

KINDS = {
    "ViTForImageClassification": "none",
    "DeiTForImageClassification": "token",
    "DeiTForImageClassificationWithTeacher": "head",
}
SIZES = {"tiny": (12, 192, 3), "small": (12, 384, 6), "base": (12, 768, 12), "large": (24, 1024, 16)}
TIMM = [f"vit_{size}_patch{patch}_{side}" for size in SIZES for patch in (8, 16, 32) for side in (224, 384)]
BODY: list[Row] = [
    ("embeddings.cls_token", "class_token", "array"),
    ("embeddings.distillation_token", "teacher_token", "array"),
    ("embeddings.position_embeddings", "positions", "array"),
    ("embeddings.patch_embeddings.projection", "patches", "conv"),
    ("encoder.layer.{n}.layernorm_before", "layer_{n}/attention_norm", "norm"),
    ("encoder.layer.{n}.attention.attention.query", "layer_{n}/attention/q", "linear"),
    ("encoder.layer.{n}.attention.attention.key", "layer_{n}/attention/k", "linear"),
    ("encoder.layer.{n}.attention.attention.value", "layer_{n}/attention/v", "linear"),
    ("encoder.layer.{n}.attention.output.dense", "layer_{n}/attention/o", "linear"),
    ("encoder.layer.{n}.layernorm_after", "layer_{n}/mlp_norm", "norm"),
    ("encoder.layer.{n}.intermediate.dense", "layer_{n}/mlp/up", "linear"),
    ("encoder.layer.{n}.output.dense", "layer_{n}/mlp/down", "linear"),
    ("layernorm", "norm", "norm"),
]
OTHERS: list[Row] = [
    ("cls_token", "class_token", "array"),
    ("pos_embed", "positions", "array"),
    ("patch_embed.proj", "patches", "conv"),
    ("blocks.{n}.norm1", "layer_{n}/attention_norm", "norm"),
    ("blocks.{n}.attn.qkv", tuple(f"layer_{{n}}/attention/{k}" for k in "qkv"), "linear"),
    ("blocks.{n}.attn.proj", "layer_{n}/attention/o", "linear"),
    ("blocks.{n}.norm2", "layer_{n}/mlp_norm", "norm"),
    ("blocks.{n}.mlp.fc1", "layer_{n}/mlp/up", "linear"),
    ("blocks.{n}.mlp.fc2", "layer_{n}/mlp/down", "linear"),
    ("norm", "norm", "norm"),
    ("head", "logits", "linear"),
]


def table(model: ViT, names: set[str]) -> list[Row]:
    """timm's where the tensors are named so."""
    if "patch_embed.proj.weight" in names:
        return OTHERS
    prefix = "vit" if model.teacher == "none" else "deit"
    logits = "cls_classifier" if model.teacher == "head" else "classifier"
    heads = [(logits, "logits", "linear"), ("distillation_classifier", "teacher_logits", "linear")]
    return [*((f"{prefix}.{theirs}", ours, kind) for theirs, ours, kind in BODY), *heads]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a ViT; of timm's names, from the architecture's own name."""
    if "architectures" not in c:
        size, patch, side = re.fullmatch(r"vit_(\w+)_patch(\d+)_(\d+)", c["architecture"]).groups()
        layers, width, heads = SIZES[size]
        only(c, "global_pool", "token")
        shape = {"layers": layers, "width": width, "heads": heads, "patch": int(patch), "image": int(side)}
        return shape | {"outputs": c.get("num_classes", 1000)}
    return {
        "image": c.get("image_size", 224),
        "patch": c.get("patch_size", 16),
        "layers": c.get("num_hidden_layers", 12),
        "width": c.get("hidden_size", 768),
        "heads": c.get("num_attention_heads", 12),
        "mlp": c.get("intermediate_size", 3072),
        "activation": unit_from(c, "hidden_act", "gelu"),
        "bias": c.get("qkv_bias", True),
        "epsilon": c.get("layer_norm_eps", 1e-12),
        "dropout": c.get("hidden_dropout_prob", 0.0),
        "teacher": KINDS[FAMILY.architecture(c)],
        "outputs": labels(c),
    }


def write(model: ViT) -> Config:
    """config.json of a ViT or a DeiT."""
    if model.pool != "token":
        raise UsageError("a ViT that pools by the mean has no form that transformers reads: only pool='token' has")
    return {
        "architectures": [next(k for k, v in KINDS.items() if v == model.teacher)],
        "model_type": "vit" if model.teacher == "none" else "deit",
        "image_size": model.image,
        "patch_size": model.patch,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp or 4 * model.width,
        "hidden_act": unit_to(model.activation),
        "qkv_bias": model.bias,
        "layer_norm_eps": model.epsilon,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        **labels_of(model.outputs),
    }


FAMILY = Family(
    architectures=(*KINDS, *TIMM),
    kind=ViT,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, model.image, model.image, 3), "float32"),),
    ignored=(r"^(vit|deit)\.pooler\.",),
)
