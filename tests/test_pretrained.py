"""Weights of others: golden fixtures of every architecture, what is refused, shards, meshes, tokenizers.

The fixtures (tests/golden/pretrained) are made by tests/test_parity.py, which needs torch; these tests do not.
"""

import functools
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, run_with_devices
from strict import no_silent_transfer

import bigjax
from bigjax import UsageError, pretrained
from bigjax.models import GPT, MLP, ViT
from bigjax.models.layers import BatchNorm
from bigjax.pretrained import copying, names, reading, store
from bigjax.pretrained.families import family_for
from bigjax.tools import commands

GOLD = REPOSITORY / "tests" / "golden" / "pretrained"
NAMES = sorted(p.stem for p in GOLD.glob("*.json"))


def unpacked(name: str, folder: Path) -> dict[str, Any]:
    """A fixture as a folder of the hub; what is expected of it."""
    told = json.loads((GOLD / f"{name}.json").read_text())
    (folder / store.CONFIG).write_text(json.dumps(told["config"]))
    shutil.copy(GOLD / f"{name}.safetensors", folder / store.WHOLE)
    told["inputs"] = {k: picture(*v) if k == "pixel_values" else v for k, v in told["inputs"].items()}
    return told


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a model as JSON has them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def picture(*shape: int) -> np.ndarray:
    """Pixels (B, C, H, W), of which a fixture keeps only the shape."""
    return np.sin(np.arange(np.prod(shape)) * 0.7).astype(np.float32).reshape(shape)


def called(inputs: dict[str, Any]) -> tuple[jax.Array, ...]:
    """Inputs by their names in transformers, as our model takes them."""
    if "pixel_values" in inputs:
        return (jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1)),)
    given = {k: np.array(v) for k, v in inputs.items()}
    tokens, mask = jnp.asarray(given["input_ids"], "int32"), given["attention_mask"]
    if "decoder_input_ids" in given:
        return tokens, jnp.asarray(given["decoder_input_ids"], "int32"), jnp.asarray(mask)
    if "token_type_ids" in given:
        return tokens, jnp.asarray(mask), jnp.asarray(given["token_type_ids"], "int32")
    return tokens, jnp.asarray(mask.sum(1), "int32")


def counted(inputs: dict[str, Any], out: Any) -> np.ndarray:
    """Which of the results mean something: those of real tokens, or all where there is one a row."""
    mask = np.array(inputs.get("attention_mask", np.ones(len(out))), bool)
    return mask if out.shape[:2] == mask.shape else np.ones(len(out), bool)


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits(name: str, tmp_path: Path) -> None:
    """Loaded, saved and loaded again, with no transfer that nobody asked for."""
    told = unpacked(name, tmp_path)
    fields = given(told.get("fields", {}))  # of a size that nobody has a name for
    with no_silent_transfer():
        model, variables = pretrained.load(tmp_path, **fields)
        assert jax.tree.leaves(variables)[0].dtype == jnp.float32
        if not fields:
            pretrained.save(tmp_path / "again", model, variables)
            again, same = pretrained.load(tmp_path / "again")
            assert again == model
            jax.tree.map(np.testing.assert_array_equal, same, variables)
    logits = np.asarray(jax.jit(model.apply)(variables, *called(told["inputs"])))
    expected = np.array(told["logits"], np.float32)
    np.testing.assert_allclose(logits[counted(told["inputs"], logits)], expected, atol=1e-4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    unpacked("qwen2", tmp_path)
    return tmp_path


def rewritten(folder: Path, **changes: Any) -> None:
    """Its tensors with some taken away (None), or others in their place."""
    tensors = store.Tensors(folder)
    arrays = {k: np.array(tensors.read(k)) for k in tensors.places} | changes
    rows = [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items() if v is not None]
    store.write_tensors(folder / store.WHOLE, rows)


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / store.CONFIG).read_text()) | changes
    (folder / store.CONFIG).write_text(json.dumps(config))


def test_tensors_that_do_not_fit_are_all_listed(folder: Path) -> None:
    lost, odd = "model.layers.0.self_attn.q_proj.bias", "model.norm.weight"
    rewritten(folder, **{lost: None, odd: np.ones(5, np.float32), "nope": np.ones(1, np.float32)})
    with pytest.raises(UsageError) as e:
        pretrained.load(folder)
    told = f"(1 missing: {lost}; 1 not of this model: nope; 1 of another shape: {odd} [5] for [16]): get both from one"
    assert told in str(e.value)


def index_of_lost(folder: Path) -> None:
    (folder / store.INDEX).write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))


def pickled(folder: Path) -> None:
    (folder / store.WHOLE).rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    data = (folder / store.WHOLE).read_bytes()
    (folder / store.WHOLE).write_bytes(data[:-10])


def of(name: str, **changes: Any) -> Any:
    """Another fixture, changed."""

    def spoil(folder: Path) -> None:
        unpacked(name, folder)
        configured(folder, **changes)

    return spoil


def of_timm(**changes: Any) -> Any:
    def spoil(folder: Path) -> None:
        (folder / store.CONFIG).write_text(json.dumps(changes))

    return spoil


def no_index(folder: Path) -> None:
    (folder / store.INDEX).write_text(json.dumps({"weight_map": ["model-2.safetensors"]}))


def link_to_nothing(folder: Path) -> None:
    (folder / store.WHOLE).unlink()
    (folder / "model-1.safetensors").symlink_to("nowhere")


LINEAR = {"type": "linear", "factor": 2.0}
WRONG = {
    "unknown": (
        lambda f: configured(f, architectures=["FooModel"]),
        "names FooModel, which is not known here: .*Llama",
    ),
    "text": (lambda f: configured(f, architectures="GPT"), "names GPT, which is not known here"),
    "none": (lambda f: configured(f, architectures=None), "names no architecture, which is not known here"),
    "no_config": (
        lambda f: (f / store.CONFIG).unlink(),
        "has no config.json, which says what the model is: add the one",
    ),
    "bad_config": (lambda f: (f / store.CONFIG).write_text("{"), "config.json cannot be read .*: fetch it again"),
    "list": (lambda f: (f / store.CONFIG).write_text("[]"), "config.json holds no JSON object: fetch it again"),
    "pickle": (pickled, r"holds pickles \(pytorch_model.bin\), which can run any code when they are read: where you"),
    "none_at_all": (lambda f: (f / store.WHOLE).unlink(), "has no model.safetensors: add the weights"),
    "cut": (cut, r"is truncated or damaged \(\d+ bytes, where its header says \d+\): fetch it again"),
    "empty": (lambda f: (f / store.WHOLE).write_bytes(b""), "is truncated or damaged .*: fetch it again"),
    "garbage": (lambda f: (f / store.WHOLE).write_bytes(b"x" * 99), "is truncated or damaged .*: fetch it again"),
    "lost_shard": (index_of_lost, "lacks model-2.safetensors, of its 1 files: fetch them"),
    "rope": (lambda f: configured(f, rope_parameters={"rope_type": "yarn"}), "rope_type = 'yarn', which is not known"),
    "windows": (
        lambda f: configured(f, sliding_window=4, use_sliding_window=True, layer_types=["chunked_attention"] * 2),
        "layer_types = 'chunked_attention', which is not known here: only 'full_attention', 'sliding_attention'",
    ),
    "no_index": (no_index, "index.json does not say which file each tensor is in: fetch it again"),
    "link": (
        link_to_nothing,
        r"model-1.safetensors cannot be read \(No such file or directory\): put it",
    ),
    "names": (lambda f: configured(f, architectures=[{}]), "names no architecture, which is not known here"),
    "quantized": (
        lambda f: configured(f, quantization_config={"quant_method": "gptq"}),
        "says that the weights are quantized .*: give a folder of the same model with whole ones",
    ),
    "integers": (
        lambda f: rewritten(f, **{"model.norm.weight": np.ones(16, np.int8)}),
        r"describes \(1 of integers: model.norm.weight\)",
    ),
    "another_head": (
        lambda f: configured(f, tie_word_embeddings=True),
        "lm_head.weight in .* is not model.embed_tokens.weight, which its config.json says",
    ),
    "tied_no_more": (
        of("bert_masked", tie_word_embeddings=False),
        "tie_word_embeddings = False, which is not known here: only True",
    ),
    "rope_of_old": (of("mixtral", rope_parameters=None, rope_scaling=LINEAR), "rope_type = 'linear', which is not"),
    "rope_first": (lambda f: configured(f, rope_scaling={"type": "dynamic"}), "rope_type = 'dynamic', which is not"),
    "partial": (lambda f: configured(f, partial_rotary_factor=0.5), "partial_rotary_factor = 0.5, which is not known"),
    "partial_gemma": (of("gemma", partial_rotary_factor=0.5), "partial_rotary_factor = 0.5, which is not known here"),
    "two_numbers": (of("gpt2", num_attention_heads=2), "n_head = 4, which is not known here: only 2"),
    "units": (of("t5", dense_act_fn="gelu"), "dense_act_fn = 'gelu', which is not known here: only 'relu'"),
    "oblong": (of("vit", image_size=[12, 16]), r"image_size = \[12, 16\], which is not known here: only one side"),
    "epsilon": (of("vit", layer_norm_eps="a"), "config.json and these fields make no ViT .*: correct them"),
    "timms_pool": (
        of_timm(architecture="resnet50", pretrained_cfg={"global_pool": "max"}),
        "global_pool = 'max', which is not known here: only 'avg'",
    ),
    "timms_arguments": (
        of_timm(architecture="vit_base_patch16_224", global_pool="token", model_args={"reg_tokens": 4}),
        "gives vit_base_patch16_224 the arguments reg_tokens, which are not known here: only none are",
    ),
    "nonsense": (lambda f: configured(f, num_attention_heads="four"), "config.json and these fields make no GPT"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_one_line(wrong: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, said = WRONG[wrong]
    spoil(folder)
    with pytest.raises(UsageError, match=said) as e:
        pretrained.load(folder)
    assert "\n" not in str(e.value)
    with pytest.raises(UsageError, match=said):
        reading.described(folder)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "nowhere is no folder here and no hub id: give a folder, or owner/name"),
        ("config.json", "is a file: give the folder that holds config.json"),
        ("", "cannot be read or written here"),
        ("gs://bucket/folder", "is in a bucket, and tensors are read from files: copy the folder here, and give that"),
    ],
)
def test_what_is_no_folder(source: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=said):
        pretrained.load(source)


def test_other_words_for_the_same(tmp_path: Path) -> None:
    """Names that transformers takes too, and sides that are equal."""
    for name, old, new in (
        ("gpt2", "n_head", {"num_attention_heads": 4}),
        ("t5", "num_heads", {"num_attention_heads": 3}),
        ("mixtral", "num_local_experts", {"num_experts": 3}),
        ("vit", "image_size", {"image_size": [12, 12], "patch_size": [4, 4]}),
    ):
        unpacked(name, tmp_path)
        model, _ = pretrained.load(tmp_path)
        config = json.loads((tmp_path / store.CONFIG).read_text())
        config.pop(old)
        (tmp_path / store.CONFIG).write_text(json.dumps(config | new))
        assert pretrained.load(tmp_path)[0] == model


def test_a_dtype_that_is_none(folder: Path) -> None:
    for name in ("dtype", "param_dtype"):
        with pytest.raises(UsageError, match="dtype 'float31' is none .*: use one of float32, bfloat16, float16"):
            pretrained.load(folder, **{name: "float31"})


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason='the hub needs the extra: pip install -e ".[hub]"')
    offline = {"local_files_only": True, "cache_dir": tmp_path}
    monkeypatch.setattr(hub, "snapshot_download", functools.partial(hub.snapshot_download, **offline))
    with pytest.raises(UsageError, match="no-one/nothing is no folder here, and the hub did not give it .*: check its"):
        pretrained.load("no-one/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r'a hub id needs huggingface_hub: pip install -e "\.\[hub\]"'):
        pretrained.load("no-one/nothing")


def test_shards_with_an_index_are_one_file(folder: Path) -> None:
    _, variables = pretrained.load(folder)
    tensors = store.Tensors(folder)
    names = sorted(tensors.places)
    rows = [(k, tensors.shape(k), tensors.read(k).dtype, lambda k=k: tensors.read(k)) for k in names]
    parts = {"model-1.safetensors": rows[:5], "model-2.safetensors": rows[5:]}
    for file, some in parts.items():
        store.write_tensors(folder / file, some)
    (folder / store.WHOLE).unlink()
    with pytest.raises(UsageError, match="has model-1.safetensors, model-2.safetensors but no model.safetensors.index"):
        pretrained.load(folder)
    index = {k: file for file, some in parts.items() for k, *_ in some}
    (folder / store.INDEX).write_text(json.dumps({"weight_map": index}))
    twice = np.zeros(tensors.shape(names[0]), np.float32)  # of which the index names the other
    row = (names[0], twice.shape, twice.dtype, lambda: twice)
    store.write_tensors(folder / "model-2.safetensors", [*rows[5:], row])
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(folder)[1], variables)


@pytest.mark.parametrize("name", ["gpt2", "qwen2_windows", "gemma", "mixtral", "bert_masked", "vit", "dinov2", "t5"])
def test_scanned_layers_are_the_same_stacked_and_saved_the_same(name: str, tmp_path: Path) -> None:
    told = unpacked(name, tmp_path)
    model, variables = pretrained.load(tmp_path)
    scanned, stacked = pretrained.load(tmp_path, scan=True, remat="full", param_dtype="bfloat16")
    assert scanned == model.clone(scan=True, remat="full")
    assert {x.dtype for x in jax.tree.leaves(stacked)} == {jnp.dtype("bfloat16")}
    pretrained.save(tmp_path / "again", scanned, stacked)
    assert (tmp_path / "again" / store.WHOLE).stat().st_size < 0.6 * sum(
        x.nbytes for x in jax.tree.leaves(variables)
    ) + 6000
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path / "again")[1], variables)
    stacked = jax.tree.map(lambda x: x.astype(jnp.float32), stacked)
    logits = np.asarray(jax.jit(scanned.apply)(stacked, *called(told["inputs"])))
    expected = np.array(told["logits"], np.float32)
    np.testing.assert_allclose(logits[counted(told["inputs"], logits)], expected, atol=1e-4)


def split_over_eight(folder: str) -> None:
    """In a process with 8 devices: each holds its part, and reads no more than that."""
    from bigjax.sharding import MeshConfig, make_mesh

    read, count = [], store.Tensors.read

    def counting(self: store.Tensors, name: str, index: Any = ()) -> np.ndarray:
        array = count(self, name, index)
        read.append((name, array.size))
        return array

    store.Tensors.read = counting
    for scan in (False, True):
        read.clear()
        one = pretrained.load(folder, scan=scan)[1]
        largest = max(size for _, size in read)
        read.clear()
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), batch_size=8)
        _, many = pretrained.load(folder, mesh=mesh, scan=scan)
        assert max(size for _, size in read) <= largest // 4 == 16 * 64 // 4
        jax.tree.map(np.testing.assert_array_equal, many, one)
        layer = many["params"]["layers" if scan else "layer_0"]
        kernel = layer["mlp"]["up"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
        assert len({s.device for s in kernel.addressable_shards}) == 8
        moved = jax.jit(lambda v: jax.tree.map(lambda x: x + 1, v), donate_argnums=0)(many)
        jax.tree.map(np.testing.assert_array_equal, moved, jax.tree.map(lambda x: x + 1, one))


def test_on_a_mesh_each_device_gets_its_part(tmp_path: Path) -> None:
    model = GPT(vocabulary=16, layers=2, width=16, heads=4, context=8)
    pretrained.save(tmp_path, model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), "int32")))
    run_with_devices(f"import test_pretrained; test_pretrained.split_over_eight({str(tmp_path)!r})", folder=tmp_path)


def test_what_is_loaded_is_its_own(tmp_path: Path) -> None:
    """A file may change, and a step may give its memory away: also where JAX could take over pages of the file."""
    unpacked("gpt2", tmp_path)
    file = tmp_path / store.WHOLE
    tensors = store.Tensors(tmp_path)
    rows = [(k, tensors.shape(k), np.dtype("float32"), lambda k=k: tensors.read(k)) for k in tensors.places]
    store.write_tensors(file, rows)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    more = -(8 + size) % 64  # so that tensors begin where JAX asks memory to begin
    file.write_bytes((size + more).to_bytes(8, "little") + data[8 : 8 + size] + b" " * more + data[8 + size :])
    _, variables = pretrained.load(tmp_path)
    kept = jax.tree.map(lambda x: np.array(x, copy=True), variables)
    with open(file, "r+b") as opened:
        opened.seek(8 + size + more)
        opened.write(b"\1" * (len(data) - 8 - size))
    jax.tree.map(np.testing.assert_array_equal, variables, kept)
    moved = jax.jit(lambda v: jax.tree.map(lambda x: x + 1, v), donate_argnums=0)(variables)
    jax.tree.map(np.testing.assert_array_equal, moved, jax.tree.map(lambda x: x + 1, kept))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copies_in_pieces_are_copies(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of arrays in any order of axes, parts of larger ones, and such as have nothing in them."""
    monkeypatch.setattr(copying, "PIECE", 64)
    whole = np.arange(2 * 7 * 5 * 3, dtype=np.float32).reshape(2, 7, 5, 3).astype(dtype)
    views = [whole, whole.transpose(3, 1, 0, 2), whole[1, 2:, ::2].transpose(2, 1, 0), whole[0, 0, 0], whole[:, :0]]
    views += [whole[1, 1, 1, 1:2][0:1], np.array(whole[1, 1, 1, 1])]
    outs = [copying.empty(view.shape, np.dtype(np.float32)) for view in views]
    copying.fill(zip(outs, views))
    for out, view in zip(outs, views):
        np.testing.assert_array_equal(out, view.astype(np.float32))
        assert out.flags.c_contiguous and (out.ctypes.data % copying.ALIGNED == 0 or not out.size)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "t5", "resnet"])
def test_shapes_are_those_of_the_model_itself(name: str, tmp_path: Path) -> None:
    """Though its layers are traced as one."""
    unpacked(name, tmp_path)
    model, _ = pretrained.load(tmp_path)
    inputs = family_for(model).inputs(model)
    zeros = [jnp.zeros(s.shape, s.dtype) for s in inputs]
    assert names.shapes_of(model, inputs) == jax.eval_shape(lambda: model.init(jax.random.key(0), *zeros))


def test_only_models_that_others_have_are_saved(tmp_path: Path) -> None:
    for model, said in (
        (MLP(), "a MLP has no form that others read: only .*GPT"),
        (GPT(position="rotary"), "this GPT is neither GPT-2 .* nor Llama"),
        (
            GPT(position="rotary", norm="rms", activation="swiglu", bias=False, qkv_bias=True, qk_norm=True),
            "has parts that no one architecture has together: Llama .*Qwen3",
        ),
        (
            ViT(layer_scale=1.0, mlp=7),
            "this ViT with layer_scale is no DINOv2 that transformers reads: only one whose mlp is a multiple",
        ),
        (ViT(outputs=0), "a ViT that pools by the mean, or has no head, has no form that transformers reads"),
    ):
        with pytest.raises(UsageError, match=said):
            pretrained.save(tmp_path, model, {"params": {}})
    (tmp_path / "file").write_text("")
    model = GPT(vocabulary=3, layers=1, width=4, heads=1, context=2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), "int32"))
    with pytest.raises(UsageError, match="file cannot be written .*: make room there, or choose another folder"):
        pretrained.save(tmp_path / "file", model, variables)
    del variables["params"]["norm"]["bias"]
    variables["params"]["positions"]["embedding"] = jnp.zeros((3, 4))
    with pytest.raises(
        UsageError, match=r"\(params/norm/bias, params/positions/embedding differ\): give the model that"
    ):
        pretrained.save(tmp_path / "file", model, variables)


def test_older_configs_say_the_same(tmp_path: Path) -> None:
    """Of rotary positions, as transformers 4 wrote them; and with what nobody has to say left out."""
    unpacked("llama3", tmp_path)
    model, _ = pretrained.load(tmp_path)
    assert model.rope_base == 500.0 and model.rope_scaling == (8.0, 1.0, 4.0, 9)
    config = json.loads((tmp_path / store.CONFIG).read_text())
    rope = config.pop("rope_parameters")
    old = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / store.CONFIG).write_text(json.dumps(config | old))
    assert pretrained.load(tmp_path)[0] == model
    unpacked("llama", tmp_path)
    for key in ("rope_scaling", "rope_parameters"):
        configured(tmp_path, **{key: None})
    assert pretrained.load(tmp_path)[0].rope_base == 10_000.0


def test_a_gemmas_layers_have_a_period_or_are_refused(tmp_path: Path) -> None:
    """As transformers 4 said it, and as 5 does."""
    unpacked("gemma", tmp_path)
    model, _ = pretrained.load(tmp_path)
    assert (model.period, model.rope_base, model.rope_factor, model.local_rope_base) == (2, 500.0, 4.0, 9.0)
    scaling = {"rope_type": "linear", "factor": 4.0}
    old = {"rope_theta": 500.0, "rope_local_base_freq": 9.0, "rope_scaling": scaling, "rope_parameters": None}
    near, far = "sliding_attention", "full_attention"
    configured(tmp_path, **old, sliding_window_pattern=None, layer_types=[near, far, near])
    assert pretrained.load(tmp_path)[0] == model
    configured(tmp_path, layer_types=[near] * 3, sliding_window_pattern=2)
    assert pretrained.load(tmp_path)[0].period == 4
    configured(tmp_path, layer_types=[far, far, near])
    with pytest.raises(UsageError, match="layer_types have no period, which is not known here: only every so-manieth"):
        pretrained.load(tmp_path)


def test_older_names_and_what_stands_beside(tmp_path: Path) -> None:
    """GPT-2's first release has no prefix, and its masks as tensors."""
    unpacked("gpt2", tmp_path)
    _, variables = pretrained.load(tmp_path)
    tensors = store.Tensors(tmp_path)
    arrays = {k.removeprefix("transformer."): np.array(tensors.read(k)) for k in tensors.places}
    arrays |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "lm_head.weight": arrays["wte.weight"]}
    store.write_tensors(tmp_path / store.WHOLE, [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()])
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(tmp_path)[1], variables)


def test_timms_names_are_known_too(tmp_path: Path) -> None:
    """Queries, keys and values side by side, written here by hand."""
    told = unpacked("vit", tmp_path)
    _, variables = pretrained.load(tmp_path)
    tensors = store.Tensors(tmp_path)
    old = {k.removeprefix("vit."): np.array(tensors.read(k)) for k in tensors.places}
    embeddings, layer = "embeddings.", "encoder.layer.{}."
    names = {
        "cls_token": embeddings + "cls_token",
        "pos_embed": embeddings + "position_embeddings",
        **{f"patch_embed.proj.{k}": f"{embeddings}patch_embeddings.projection.{k}" for k in ("weight", "bias")},
        **{f"norm.{k}": f"layernorm.{k}" for k in ("weight", "bias")},
        **{f"head.{k}": f"classifier.{k}" for k in ("weight", "bias")},
    }
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    parts |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for n in range(2):
        pairs = (
            (f"blocks.{n}.{a}.{k}", f"{layer.format(n)}{b}.{k}") for a, b in parts.items() for k in ("weight", "bias")
        )
        names |= dict(pairs)
    arrays = {new: old[name] for new, name in names.items()}
    for n in range(2):
        three = [old[f"encoder.layer.{n}.attention.attention.{k}.weight"] for k in ("query", "key", "value")]
        arrays[f"blocks.{n}.attn.qkv.weight"] = np.concatenate(three)
    store.write_tensors(tmp_path / store.WHOLE, [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()])
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "global_pool": "token"}
    (tmp_path / store.CONFIG).write_text(json.dumps(config))
    fields = {"layers": 2, "width": 12, "heads": 3, "mlp": 10, "patch": 4, "image": 12, "bias": False}
    model, same = pretrained.load(tmp_path, **fields)
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    assert model.epsilon == 1e-6 and len(told["logits"][0]) == 3


def test_torchvisions_names_are_known_too(tmp_path: Path) -> None:
    unpacked("resnet_bottleneck", tmp_path)
    model, variables = pretrained.load(tmp_path)
    tensors = store.Tensors(tmp_path)
    names = [
        (r"resnet\.embedder\.embedder\.convolution", "conv1"),
        (r"resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"resnet\.encoder\.stages\.0\.layers\.", "layer1."),
        (r"resnet\.encoder\.stages\.1\.layers\.", "layer2."),
        *((rf"layer\.{n}\.convolution", f"conv{n + 1}") for n in range(3)),
        *((rf"layer\.{n}\.normalization", f"bn{n + 1}") for n in range(3)),
        (r"shortcut\.convolution", "downsample.0"),
        (r"shortcut\.normalization", "downsample.1"),
        (r"classifier\.1", "fc"),
    ]
    arrays = {}
    for name in tensors.places:
        given = name
        for old, new in names:
            given = re.sub(old, new, given)
        arrays[given] = np.array(tensors.read(name))
    assert {"conv1.weight", "layer2.1.bn3.running_var", "layer1.0.downsample.0.weight", "fc.bias"} <= arrays.keys()
    store.write_tensors(tmp_path / store.WHOLE, [(k, v.shape, v.dtype, lambda v=v: v) for k, v in arrays.items()])
    (tmp_path / store.CONFIG).write_text(json.dumps({"architecture": "resnet50", "num_classes": 3}))
    again, same = pretrained.load(tmp_path, stages=model.stages, width=model.width, widths=model.widths)
    assert again == model
    jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_batch_norm_averages_the_variance_of_the_population() -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 1, 4)).astype(np.float32)
    norm = BatchNorm(train=True)
    variables = norm.init(jax.random.key(0), x)
    y, state = jax.jit(functools.partial(norm.apply, mutable="batch_stats"))(variables, x)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * mean, atol=1e-6)
    np.testing.assert_allclose(state["batch_stats"]["var"], 0.9 + 0.1 * x.var((0, 1, 2), ddof=1), atol=1e-6)
    np.testing.assert_array_equal(variables["batch_stats"]["var"], 1)


def test_the_command_says_what_a_folder_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["bigjax", "pretrained", str(folder)])
    commands.main()
    said = capsys.readouterr().out
    for part in (
        "Qwen2ForCausalLM -> bigjax.models.GPT",
        "vocabulary    23",
        "kept as       BF16",
        "loads         yes",
    ):
        assert part in said
    cut(folder)
    with pytest.raises(SystemExit) as e:
        commands.main()
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_bigjax_pretrained_is_there_when_it_is_asked_for() -> None:
    assert bigjax.pretrained is pretrained and callable(bigjax.pretrained.load)
    with pytest.raises(AttributeError, match="has no attribute 'nope'"):
        _ = pretrained.nope


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<assistant>{% endif %}"


def test_a_tokenizer_with_its_special_tokens_and_chat_template(tmp_path: Path) -> None:
    import tokenizers

    from bigjax.data.text import train_tokenizer

    with pytest.raises(UsageError, match="has no tokenizer.json: let transformers write it"):
        pretrained.tokenizer(tmp_path)
    library = train_tokenizer(["a b c hello world"] * 3, kind="bpe", vocabulary=270)
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    plain = pretrained.tokenizer(tmp_path)
    assert plain.id("eos_token") is None
    with pytest.raises(UsageError, match="this tokenizer has no chat template: write the prompt by hand"):
        plain.chat([])
    said = {"eos_token": "</s>", "pad_token": {"content": "[PAD]"}, "chat_template": CHAT}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = pretrained.tokenizer(tmp_path)
    assert tokenizer.id("eos_token") == library.token_to_id("</s>") and tokenizer.id("pad_token") == 0
    tokens_BL, length_B = tokenizer.batch(["hello world", "a"])
    assert tokens_BL.shape == (2, length_B.max()) and (tokens_BL[1, length_B[1] :] == 0).all()
    assert tokenizer.decode(tokens_BL[0]) == "hello world"
    ends = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", tokenizer.id("eos_token"))])
    tokenizer.coder.post_processor = ends
    assert tokenizer.batch(["hello world"], length=2)[0].tolist()[0][1:] == [tokenizer.id("eos_token")]
    assert len(tokenizer.encode("hello world a b c")) > 3
    tokenizer.coder.post_processor = None
    pytest.importorskip("jinja2", reason='chat templates need the extra: pip install -e ".[hub]"')
    assert tokenizer.chat([{"role": "user", "content": "hi"}]) == "<user>hi</s><assistant>"
    evil = said | {"chat_template": "{{ ''.__class__.__mro__ }}{{ raise_exception('no') }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(evil))
    with pytest.raises(UsageError, match="the chat template does not take these messages"):
        pretrained.tokenizer(tmp_path).chat([])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match="tokenizer.json cannot be read .*: fetch it again"):
        pretrained.tokenizer(tmp_path)
