"""BERT and its heads, as `bigjax.models.BERT`."""

import jax

from bigjax.models.bert import BERT
from bigjax.pretrained.families import Config, Family, labels, labels_of, only, unit_from, unit_to
from bigjax.pretrained.names import Row

HEADS = {
    "BertModel": "none",
    "BertForMaskedLM": "masked",
    "BertForSequenceClassification": "sequence",
    "BertForTokenClassification": "token",
    "BertForQuestionAnswering": "question",
}
BODY: list[Row] = [
    ("embeddings.word_embeddings", "embedding", "embedding"),
    ("embeddings.token_type_embeddings", "segments", "embedding"),
    ("embeddings.position_embeddings", "positions", "embedding"),
    ("embeddings.LayerNorm", "embedding_norm", "norm"),
    ("encoder.layer.{n}.attention.self.query", "layer_{n}/attention/q", "linear"),
    ("encoder.layer.{n}.attention.self.key", "layer_{n}/attention/k", "linear"),
    ("encoder.layer.{n}.attention.self.value", "layer_{n}/attention/v", "linear"),
    ("encoder.layer.{n}.attention.output.dense", "layer_{n}/attention/o", "linear"),
    ("encoder.layer.{n}.attention.output.LayerNorm", "layer_{n}/attention_norm", "norm"),
    ("encoder.layer.{n}.intermediate.dense", "layer_{n}/mlp/up", "linear"),
    ("encoder.layer.{n}.output.dense", "layer_{n}/mlp/down", "linear"),
    ("encoder.layer.{n}.output.LayerNorm", "layer_{n}/mlp_norm", "norm"),
    ("pooler.dense", "pooler", "linear"),
]
HEAD: list[Row] = [
    ("cls.predictions.transform.dense", "head", "linear"),
    ("cls.predictions.transform.LayerNorm", "head_norm", "norm"),
    ("cls.predictions.bias", "head_bias", "array"),
]


def table(model: BERT, names: set[str]) -> list[Row]:
    """Without a head their modules have no prefix."""
    if model.head == "none":
        return BODY
    logits = ("qa_outputs" if model.head == "question" else "classifier", "logits", "linear")
    return [*((f"bert.{theirs}", ours, kind) for theirs, ours, kind in BODY), *HEAD, logits]


def read(c: Config, names: set[str]) -> Config:
    """The fields of a BERT."""
    only(c, "position_embedding_type", "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        only(c, name, False)
    if (head := HEADS[FAMILY.architecture(c)]) == "masked":
        only(c, "tie_word_embeddings", True)
    return {
        "vocabulary": c.get("vocab_size", 30522),
        "layers": c.get("num_hidden_layers", 12),
        "width": c.get("hidden_size", 768),
        "heads": c.get("num_attention_heads", 12),
        "mlp": c.get("intermediate_size", 3072),
        "context": c.get("max_position_embeddings", 512),
        "segments": c.get("type_vocab_size", 2),
        "activation": unit_from(c, "hidden_act", "gelu"),
        "epsilon": c.get("layer_norm_eps", 1e-12),
        "dropout": c.get("hidden_dropout_prob", 0.1),
        "head": head,
        "pooler": head != "none" or "pooler.dense.weight" in names,
        "outputs": labels(c),
    }


def write(model: BERT) -> Config:
    """config.json of a BERT."""
    return {
        "architectures": [next(k for k, v in HEADS.items() if v == model.head)],
        "model_type": "bert",
        "vocab_size": model.vocabulary,
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp or 4 * model.width,
        "max_position_embeddings": model.context,
        "type_vocab_size": model.segments,
        "hidden_act": unit_to(model.activation),
        "layer_norm_eps": model.epsilon,
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": 0.0,
        **labels_of(model.outputs),
    }


FAMILY = Family(
    architectures=tuple(HEADS),
    kind=BERT,
    read=read,
    write=write,
    table=table,
    inputs=lambda model: (jax.ShapeDtypeStruct((1, 1), "int32"),),
    ours=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),  # as the first weights have them
    ignored=(
        r"\bembeddings\.position_ids$",
        r"^bert\.pooler\.",  # of heads that do not use it
        r"^cls\.seq_relationship\.",  # the other task of pretraining
    ),
    same=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
)
