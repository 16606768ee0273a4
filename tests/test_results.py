"""No number that a reader sees differs from the JSON files of experiments/results."""

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

from bigjax import UsageError
from bigjax.tools import results

FOLDER = REPOSITORY / "experiments"
RECORDED = results.recorded(FOLDER)


def test_table_is_made_of_the_records() -> None:
    assert (FOLDER / "README.md").read_text() == results.table(FOLDER)


def test_scripts_say_what_was_measured() -> None:
    first = {}
    for record in RECORDED.values():
        first.setdefault(record["script"], record)
    scripts = {path.relative_to(FOLDER).as_posix(): path.read_text() for path in FOLDER.glob("*/*.py")}
    assert scripts.keys() > first.keys()
    for name, text in scripts.items():
        line = re.findall(r"^Measured: .*$", text, flags=re.M)
        assert line == [results.headline(first[name]) if name in first else "Measured: not yet."], name


def test_a_record_belongs_to_a_row() -> None:
    others = {"choices", "decode", "input_pipeline", "length_buckets", "load_weights", "plan_calibration", "save_stall"}
    assert {path.stem for path in (FOLDER / "results").glob("*.json")} - others == RECORDED.keys()


def test_a_script_brings_its_rows(tmp_path: Path) -> None:
    """Without being run."""
    (tmp_path / "games").mkdir()
    script = tmp_path / "games" / "chess.py"

    def read(rows: str) -> dict[str, results.Row]:
        script.write_text(f"raise SystemExit('run')\nROWS = {rows}\n")
        return results.rows(tmp_path)

    shared = {"script": "games/chess.py", "data": "none", "metric": "eval/elo"}
    short = "{'a': {'data': 'none', 'metric': 'eval/elo'}, 'b': {'data': 'none', 'metric': 'eval/elo', %s}}"
    assert read(short % "'arguments': '--x 1', 'seeds': 3") == {
        "a": {"arguments": "", "seeds": 1} | shared,
        "b": {"arguments": "--x 1", "seeds": 3} | shared,
    }
    with pytest.raises(UsageError, match="chess.py: row 'a' has no 'metric': add it in ROWS"):
        read("{'a': {'data': 'none'}}")
    with pytest.raises(UsageError, match="chess.py: ROWS is read without running the script: write it in literals"):
        read("{'a': make_row()}")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "go.py").write_text("ROWS = {'a': {'data': 'none', 'metric': 'eval/elo'}}")
    with pytest.raises(UsageError, match="go.py: row 'a' is games/chess.py's too: give it another name"):
        read(short % "'seeds': 3")


def test_readme_quotes_the_record() -> None:
    assert results.headline(RECORDED["mnist_cnn"]) in (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("name", list(RECORDED))
def test_a_record_says_its_circumstances(name: str) -> None:
    record, row = RECORDED[name], results.rows(FOLDER)[name]
    assert record["row"] == name and record["script"] == row["script"] and record["metric"] == row["metric"]
    assert record["arguments"] == row["arguments"] and record["data"] == row["data"]
    assert record["seeds"] == results.recording_seeds(row["seeds"])
    assert len(record["values"]) == row["seeds"]
    assert re.fullmatch(r"[0-9a-f]{7}", record["commit"]) and record["device"] and record["versions"]["jax"]


def test_measured_shows_mean_and_spread() -> None:
    record = {"metric": "eval/accuracy", "values": [0.99, 0.992]}
    assert results.measured(record) == "99.1 ± 0.1 % (2 seeds)"
    assert results.measured({"metric": "eval/negative_elbo", "values": [104.25]}) == "104.2"
    assert results.measured({"metric": "eval/negative_elbo", "values": [104.0, 105.0]}) == "104.5 ± 0.707 (2 seeds)"


def test_a_published_number_of_another_metric_is_named() -> None:
    published = {"metric": "eval/fid", "value": 21.7, "source": "a paper"}
    assert results.aim(published, "eval/frechet_ratio") == "fid 21.7 (a paper)"
    assert results.aim(published | {"metric": "eval/accuracy", "value": 0.5}, "eval/accuracy") == "50.0 % (a paper)"


def test_unknown_row_is_named() -> None:
    with pytest.raises(UsageError, match="there is no row 'nope': use one of mnist_autoencoder"):
        results.reproduce(["nope"])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ([0.99, 0.992], [0.991, 0.9925], "holds within its standard error (0.1 %)"),
        ([0.99, 0.992], [0.98, 0.982], "differs by -1.0 % (7.1 standard errors)"),
        ([1.0, 1.2], [1.1], "holds within its standard error (0.173)"),
        ([1.0], [1.5, 1.7], "differs by +0.6 (3.5 standard errors)"),
        ([1.0], [1.0], "the same"),
        ([1.0], [1.25], "differs by +0.25 (one seed each)"),
        ([1.0, 1.0], [1.0, 1.0], "holds within its standard error (0)"),
        ([1.0, 1.0], [2.0, 2.0], "differs by +1 (no spread to compare it with)"),
    ],
)
def test_the_verdict(old, new, said) -> None:
    metric = "eval/accuracy" if old[0] < 1 else "eval/loss"
    assert results.verdict({"metric": metric, "values": old}, {"metric": metric, "values": new}) == said


def test_which_seeds() -> None:
    assert results.seeds_of(None, 3) == [110, 111, 112] and results.seeds_of(None, 1) == [0]
    assert results.seeds_of("2", 3) == [0, 1]
    assert results.seeds_of("5..7", 1) == [5, 6, 7] and results.seeds_of("7", 1) == list(range(7))
    assert results.seeds_of("0,3,7..8", 1) == [0, 3, 7, 8]
    for wrong in ("", "0", "x", "5..", "7..5", "-1", "1..2..3", "1,1", "1.5", "3,"):
        with pytest.raises(UsageError, match=re.escape(f"--seeds {wrong}: give how many, as 10, or which")):
            results.seeds_of(wrong, 5)


SCRIPT = """
import json, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
ROWS = {"row": {"data": "none", "metric": "eval/loss", "seeds": 2}}
seed = int(flags["--seed"])
result = {"metrics": {"eval/loss": 1 + seed / 10}, "seed": seed, "step": 1, "parameters": 1, "published": []}
result |= {"seconds": {"total": 2.0, "train": 1.0, "data_wait": 0.0}, "peak_host_bytes": 1, "git_commit": None}
result |= {"devices": {"kind": "A", "count": 1, "platform": "gpu"}, "versions": {}}
json.dump(result, open(flags["--workdir"] + "/result.json", "w"))
"""


def test_reproduce_says_what_came_of_it(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/script.py").write_text(SCRIPT)
    monkeypatch.setattr(results, "experiments", lambda: tmp_path)
    results.reproduce(["row"], record=True)
    assert json.loads((tmp_path / "results/row.json").read_text())["seeds"] == [110, 111]
    capsys.readouterr()
    results.reproduce(["row"], seeds="1..3")
    assert capsys.readouterr().out.splitlines() == [
        "row seed 1: eval/loss 1.1 in 2 s",
        "row seed 2: eval/loss 1.2 in 2 s",
        "row seed 3: eval/loss 1.3 in 2 s",
        "row eval/loss: published none, recorded 12.05 ± 0.0707 (2 seeds), now 1.2 ± 0.1 (3 seeds)",
        "row: differs by -10.85 (142.1 standard errors); 2 s a run on A, 2 s recorded on A",
    ]
    with pytest.raises(UsageError, match="--record keeps what a row's own seeds give: leave --seeds out"):
        results.reproduce(["row"], seeds="1..3", record=True)


def test_other_corpus_is_refused(tmp_path, monkeypatch) -> None:
    record = {"metric": "eval/bits_per_byte", "values": [1.9], "published": [], "corpus_sha256": "a" * 64}
    (tmp_path / "results").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "gpt.py").write_text("ROWS = {'gpt': {'data': 'python', 'metric': 'eval/bits_per_byte'}}")
    (tmp_path / "results" / "gpt.json").write_text(json.dumps(record))
    monkeypatch.setattr(results, "experiments", lambda: tmp_path)
    monkeypatch.setattr(results, "run", lambda *_: record | {"corpus_sha256": "b" * 64})
    with pytest.raises(UsageError, match="recorded on another corpus"):
        results.reproduce(["gpt"])


def test_the_docs_say_what_loading_was_measured_to_cost() -> None:
    found = json.loads((FOLDER / "results" / "load_weights.json").read_text())
    said = " ".join((FOLDER.parent / "docs" / "pretrained.md").read_text().split())
    gpt2, llama, doubled = (found[k]["ratio"] for k in ("gpt2_float32", "llama_float32", "llama_bfloat16"))
    assert f"in {gpt2:.1f} (GPT-2) or {llama:.1f} times (Llama" in said and f"1 GB, in {doubled:.1f} times" in said
    beyond = max(f[k]["beyond_bytes"] for f in found.values() if "ratio" in f for k in ("sharded", "sharded_scanned"))
    assert f"at most {beyond / 1e6:.0f} MB beside the parameters" in said
    assert f"`bench/load_weights.py`, 2 CPU cores, commit {found['git_commit']}" in said


def test_the_docs_say_what_the_input_pipeline_was_measured_to_make() -> None:
    found = json.loads((FOLDER / "results" / "input_pipeline.json").read_text())
    said = " ".join((FOLDER.parent / "docs" / "data.md").read_text().split())
    cost = min(each["core_milliseconds"] for each in found["by_threads"])
    chip = [found["a_v5e_chip_takes"][name]["examples_per_second_a_chip"] for name in ("ResNet-50", "ViT-S/16")]
    assert f"takes a CPU core {cost:.1f} ms; training" in said
    assert f"takes {chip[0]:,.0f} a second at most of a ResNet-50 and {chip[1]:,.0f} of a ViT-S/16" in said
    cores = [each * cost / 1e3 for each in chip]
    assert f"{cores[0]:.1f} and {cores[1]:.1f} such cores a chip (`bench/input_pipeline.py`, commit" in said
    assert f"commit {found['git_commit']})" in said
