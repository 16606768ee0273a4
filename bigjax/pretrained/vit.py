"""ViT, DeiT and DINOv2, as `bigjax.models.ViT`: by the names of transformers, and ViT by timm's."""

import re

import jax

from bigjax import UsageError
from bigjax.models.vit import ViT
from bigjax.pretrained.families import Config, Family, arguments, labels, labels_of, only, side, unit_from, unit_to
from bigjax.pretrained.names import Row

KINDS = {
    "ViTForImageClassification": "none",
    "DeiTForImageClassification": "token",
    "DeiTForImageClassificationWithTeacher": "head",
}
DINO = {"Dinov2Model": False, "Dinov2ForImageClassification": True}  # whether it has a head
SIZES = {"tiny": (12, 192, 3), "small": (12, 384, 6), "base": (12, 768, 12), "large": (24, 1024, 16)}
TIMM = [f"vit_{size}_patch{patch}_{side}" for size in SIZES for patch in (8, 16, 32) for side in (224, 384)]
SHARED: list[Row] = [
    ("embeddings.cls_token", "class_token", "array"),
    ("embeddings.position_embeddings", "positions", "array"),
    ("embeddings.patch_embeddings.projection", "patches", "conv"),
    ("encoder.layer.{n}.attention.attention.query", "layer_{n}/attention/q", "linear"),
    ("encoder.layer.{n}.attention.attention.key", "layer_{n}/attention/k", "linear"),
    ("encoder.layer.{n}.attention.attention.value", "layer_{n}/attention/v", "linear"),
    ("encoder.layer.{n}.attention.output.dense", "layer_{n}/attention/o", "linear"),
    ("layernorm", "norm", "norm"),
]
BODY: list[Row] = [
    *SHARED,
    ("embeddings.distillation_token", "teacher_token", "array"),
    ("encoder.layer.{n}.layernorm_before", "layer_{n}/attention_norm", "norm"),
    ("encoder.layer.{n}.layernorm_after", "layer_{n}/mlp_norm", "norm"),
    ("encoder.layer.{n}.intermediate.dense", "layer_{n}/mlp/up", "linear"),
    ("encoder.layer.{n}.output.dense", "layer_{n}/mlp/down", "linear"),
]
DINO_BODY: list[Row] = [
    *SHARED,
    ("encoder.layer.{n}.norm1", "layer_{n}/attention_norm", "norm"),
    ("encoder.layer.{n}.layer_scale1.lambda1", "layer_{n}/attention_scale", "array"),
    ("encoder.layer.{n}.norm2", "layer_{n}/mlp_norm", "norm"),
    ("encoder.layer.{n}.layer_scale2.lambda1", "layer_{n}/mlp_scale", "array"),
]
DINO_PLAIN: list[Row] = [
    ("encoder.layer.{n}.mlp.fc1", "layer_{n}/mlp/up", "linear"),
    ("encoder.layer.{n}.mlp.fc2", "layer_{n}/mlp/down", "linear"),
]
DINO_GATED: list[Row] = [
    ("encoder.layer.{n}.mlp.weights_in", ("layer_{n}/mlp/gate", "layer_{n}/mlp/up"), "linear"),
    ("encoder.layer.{n}.mlp.weights_out", "layer_{n}/mlp/down", "linear"),
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
    if model.layer_scale is not None:
        body = DINO_BODY + (DINO_GATED if model.activation == "swiglu" else DINO_PLAIN)
        prefix = "dinov2." if model.outputs else ""
        return [*((f"{prefix}{theirs}", ours, kind) for theirs, ours, kind in body), ("classifier", "logits", "linear")]
    prefix = "vit" if model.teacher == "none" else "deit"
    logits = "cls_classifier" if model.teacher == "head" else "classifier"
    heads = [(logits, "logits", "linear"), ("distillation_classifier", "teacher_logits", "linear")]
    return [*((f"{prefix}.{theirs}", ours, kind) for theirs, ours, kind in BODY), *heads]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a ViT; of timm's names, from the architecture's own name."""
    if "architectures" not in c:
        size, patch, image = re.fullmatch(r"vit_(\w+)_patch(\d+)_(\d+)", c["architecture"]).groups()
        layers, width, heads = SIZES[size]
        shape = {"layers": layers, "width": width, "heads": heads, "patch": int(patch), "image": int(image)}
        return shape | {"outputs": c.get("num_classes", 1000)} | arguments(c, {}, pool="token")
    kind = FAMILY.architecture(c)
    shared = {
        "image": side(c, "image_size", 224),
        "layers": c.get("num_hidden_layers", 12),
        "width": c.get("hidden_size", 768),
        "heads": c.get("num_attention_heads", 12),
        "activation": unit_from(c, "hidden_act", "gelu"),
        "bias": c.get("qkv_bias", True),
        "dropout": c.get("hidden_dropout_prob", 0.0),
    }
    if kind in DINO:
        return shared | _dino(c, shared["width"], head=DINO[kind])
    return shared | {
        "patch": side(c, "patch_size", 16),
        "mlp": c.get("intermediate_size", 3072),
        "epsilon": c.get("layer_norm_eps", 1e-12),
        "teacher": KINDS[kind],
        "outputs": labels(c),
    }


def _dino(c: Config, width: int, *, head: bool) -> Config:
    """What sets a DINOv2 apart."""
    only(c, "drop_path_rate", 0.0)
    hidden, gated = int(width * c.get("mlp_ratio", 4)), c.get("use_swiglu_ffn", False)
    own = {"mlp": _gated(hidden), "activation": "swiglu"} if gated else {"mlp": hidden}
    return own | {
        "patch": side(c, "patch_size", 14),
        "layer_scale": c.get("layerscale_value", 1.0),
        "epsilon": c.get("layer_norm_eps", 1e-6),
        "pool": "both" if head else "token",
        "outputs": labels(c) if head else 0,
    }


def _gated(hidden: int) -> int:
    """Two thirds of the units, up to a multiple of 8."""
    return -(-int(hidden * 2 / 3) // 8) * 8


def write(model: ViT) -> Config:
    """config.json of a ViT, a DeiT or a DINOv2."""
    hidden = model.mlp or 4 * model.width
    shared = {
        "image_size": model.image,
        "patch_size": model.patch,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "qkv_bias": model.bias,
        "layer_norm_eps": model.epsilon,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
    }
    if model.layer_scale is not None:
        return shared | _dino_of(model, hidden)
    if model.pool != "token" or not model.outputs:
        raise UsageError(
            "a ViT that pools by the mean, or has no head, has no form that transformers reads: only pool='token' with "
            "outputs has, and a DINOv2 (with layer_scale)"
        )
    return shared | {
        "architectures": [next(k for k, v in KINDS.items() if v == model.teacher)],
        "model_type": "vit" if model.teacher == "none" else "deit",
        "intermediate_size": hidden,
        "hidden_act": unit_to(model.activation),
        **labels_of(model.outputs),
    }


def _dino_of(model: ViT, hidden: int) -> Config:
    """What of config.json sets a DINOv2 apart; they have its hidden units as a multiple of the width."""
    gated = model.activation == "swiglu"
    units = {_gated(r * model.width) if gated else r * model.width: r for r in range(16, 0, -1)}
    if hidden not in units or model.teacher != "none" or model.pool != ("both" if model.outputs else "token"):
        raise UsageError(
            "this ViT with layer_scale is no DINOv2 that transformers reads: only one whose mlp is a multiple of its "
            "width, with no teacher, and pool='both' with a head or pool='token' without (outputs=0)"
        )
    return {
        "architectures": ["Dinov2ForImageClassification" if model.outputs else "Dinov2Model"],
        "model_type": "dinov2",
        "mlp_ratio": units[hidden],
        "use_swiglu_ffn": gated,
        "hidden_act": "gelu" if gated else unit_to(model.activation),
        "layerscale_value": model.layer_scale,
        "use_mask_token": False,  # of pretraining alone
        **(labels_of(model.outputs) if model.outputs else {}),
    }


FAMILY = Family(
    architectures=(*KINDS, *DINO, *TIMM),
    kind=ViT,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, model.image, model.image, 3), "float32"),),
    ignored=(r"^(vit|deit)\.pooler\.", r"^(dinov2\.)?embeddings\.mask_token$"),
)
