"""The strict loader: every fault of a file at once, with its line, its path and what was probably meant."""

# ruff: noqa: E501 - a message is compared whole, on one line

from __future__ import annotations

from pathlib import Path

import pytest

from muster.config.load import load_resolved, load_run
from muster.config.schema import Layout, Run
from muster.config.units import Every
from muster.errors import ConfigError

GOOD = """\
name: tiny
model: {family: llama, layers: 2, width: 64, heads: 4, context: 32}
data:
  train: [{files: "corpus/*.txt"}]
  tokenizer: {train: bpe, vocab: 300}
train:
  tokens: 1.5M
  batch_tokens: 4k
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes) -> Path:
        path = Path("run.yaml")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def problems(write):
    def problems(content: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_run(write(content), overrides)
        return list(caught.value.problems)

    return problems


def test_a_good_file(write) -> None:
    run = load_run(write(GOOD + "  optimizer: {lr: 3e-4}\ncheckpoint: {every: 100 steps}\n"))
    assert (run.name, run.train.tokens, run.train.batch_tokens) == ("tiny", 1_500_000, 4000)
    assert run.train.optimizer.lr == 3e-4  # YAML 1.2: PyYAML would have read text
    assert run.checkpoint.every == Every(steps=100)
    assert run.layout == "auto"


def test_every_problem_at_once_sorted_by_line(problems) -> None:
    text = GOOD.replace("family", "famly").replace("4k", "4.5.6k\n  lr: 3\n  tokens: 3M")
    assert problems(text + "layout: {shrd: 2, zero: 7}\ndistill: {teacher: x}\nfoo: 1\n") == [
        "run.yaml:2: model.famly: unknown key - did you mean 'family'?",
        "run.yaml:8: train.batch_tokens: should be a quantity such as 4096, 4k, 4Ki, 1.5M or 2B (got '4.5.6k')",
        "run.yaml:9: train.lr: unknown key - 'lr' belongs in train.optimizer or train.sync.outer",
        "run.yaml:10: train.tokens: duplicate key (first on line 7)",
        "run.yaml:11: layout.shrd: unknown key - did you mean 'shard'?",
        "run.yaml:11: layout.zero: should be 0, 1, 2 or 3 (got 7)",
        "run.yaml:12: distill: not in this version of muster: remove it",
        "run.yaml:13: foo: unknown key - known here: name, model, data, train, layout, checkpoint, faults, export, serve, track",
    ]


def test_what_is_missing_is_told_at_its_section(problems) -> None:
    assert problems("name: x\nmodel: {family: llama}\ntrain:\n  batch_tokens: 4k\n") == [
        "run.yaml:1: data: required",
        "run.yaml:2: model: a new llama model also needs layers, width, heads, context",
        "run.yaml:3: train.tokens: required",
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("heads: 4", "heads: 5", "2: model: heads (5) must divide width (64): nearest legal width is 65"),
        ("layers: 2", "layers: two", "2: model.layers: should be a whole number (got 'two')"),
        ("layers: 2", "layers: 2.0", "2: model.layers: should be a whole number (got 2.0)"),
        ("layers: 2", "layers: true", "2: model.layers: should be a whole number (got true)"),
        ("layers: 2", "layers: -2", "2: model.layers: should be at least 1 (got -2)"),
        ("layers: 2", "layers: 2, tied: yes", "2: model.tied: should be true or false (got 'yes')"),
        ("layers: 2", "layers: 2, rope_theta: '1'", "2: model.rope_theta: should be a number (got '1')"),
        ("layers: 2", "layers: 2, from_: x", "2: model.from_: unknown key - did you mean 'from'?"),
        (
            "family: llama",
            "family: lama",
            "2: model.family: should be llama, mistral, qwen2, qwen3, gpt2, mixtral, qwen3_moe or dots1 (got 'lama') - did you mean 'llama'?",
        ),
        (
            "{train: bpe, vocab: 300}",
            "5",
            "5: data.tokenizer: should be {train: bpe, vocab: N}, byte, or the path of a tokenizer.json (got 5)",
        ),
        ("vocab: 300", "vocab: 9", "5: data.tokenizer.vocab: should be at least 258 (got 9)"),
        ('[{files: "corpus/*.txt"}]', "[]", "4: data.train: should have at least 1 entries (got [])"),
        ('[{files: "corpus/*.txt"}]', "corpus", "4: data.train: should be a list, such as [a, b] (got 'corpus')"),
        ('"corpus/*.txt"', "[a, 3]", "4: data.train.0.files.1: should be text (got 3)"),
        ('files: "corpus/*.txt"', "weight: 1", "4: data.train.0: needs exactly one of files or hf"),
        ("name: tiny", "name: ../x", "1: name: should be letters, digits, '.', '_' or '-', the first a letter or digit (got '../x')"),
        ("1.5M", "2k", "6: train: tokens (2000) must be at least batch_tokens (4000)"),
        ("1.5M", ".inf", "7: train.tokens: should be a quantity such as 4096, 4k, 4Ki, 1.5M or 2B (got inf)"),
        ("1.5M", "9" * 5000, "7: train.tokens: cannot be read as a number"),
        ("1.5M", "!!int x", "7: train.tokens: cannot be read as a number"),
        ("tiny", "!!python/object:os.system x", "1: name: the tag tag:yaml.org,2002:python/object:os.system is not accepted: write the plain value"),
    ],
)  # fmt: skip
def test_one_fault_is_one_sentence(problems, old: str, new: str, said: str) -> None:
    assert problems(GOOD.replace(old, new, 1)) == [f"run.yaml:{said}"]


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ("layout: autoo", "layout: should be auto, or the degrees: {shard: 2, tensor: 2, zero: 3, recompute: full, microbatch: 4} (got 'autoo')"),
        ("layout: [1]", "layout: should be auto, or the degrees: {shard: 2, tensor: 2, zero: 3, recompute: full, microbatch: 4} (got [1])"),
        ("layout: {zero: 0, shard: 2}", "layout: zero: 0 shards nothing, so write replicate: 2 instead of shard"),
        ("layout: {virtual: 2}", "layout: virtual belong to a pipeline: set pipeline to 2 or more, or leave them out"),
        ("layout: {pipeline: 2, zero: 3}", "layout: zero: 3 would gather or reduce for each of a pipeline's microbatches: use zero: 1"),
        ("swarm: {peers: 3}", "swarm: not in this version of muster: remove it"),
        ("faults: {restarts: -1}", "faults.restarts: should be at least 0 (got -1)"),
        ("faults: {hang_after: 0s}", "faults.hang_after: should be more than 0 (got '0s')"),
        ("faults: {timeouts: {vote: 10s}}", "faults.timeouts: collective (30 s) must be shorter than vote (10 s), which waits for it: lower collective, or raise vote"),
        ("faults: {grace: 0s}", "faults.grace: should be more than 0 (got '0s')"),
        ("faults: {on_nan: rewnd}", "faults.on_nan: should be stop, skip or rewind (got 'rewnd') - did you mean 'rewind'?"),
        ("track: wandb", "track: should be a list, such as [a, b] (got 'wandb')"),
        ("track: [tensorbord]", "track.0: should be tensorboard or wandb (got 'tensorbord') - did you mean 'tensorboard'?"),
        ("checkpoint: {every: 3}", "checkpoint.every: should say its unit: for example 2m, 30s or 100 steps (got 3)"),
        ("checkpoint: {every: 0s}", "checkpoint.every: should be more than 0 (got '0s')"),
        ("checkpoint: {memory: 3}", "checkpoint.memory: should say its unit: for example 2m, 30s or 100 steps (got 3)"),
        ("checkpoint: {replicas: 9}", "checkpoint.replicas: should be at most 8 (got 9)"),
        ("checkpoint: {keep_every: 5m}", "checkpoint.keep_every: counts steps: for example 1000 steps, not 5m (got '5m')"),
        ("  schedule: {warmup: 200%}", "train.schedule.warmup: should lie between 0% and 100%, but is 200% (got '200%')"),
        ("  optimizer: {lr: .nan}", "train.optimizer.lr: should be a finite number (got nan)"),
        ("  optimizer: {betas: [0.9, 1.5]}", "train.optimizer.betas.1: should be less than 1 (got 1.5)"),
        ("  optimizer: {betas: [0.9]}", "train.optimizer.betas.1: required"),
        ("  optimizer: {kind: moun}", "train.optimizer.kind: should be adamw or muon (got 'moun') - did you mean 'muon'?"),
        ("  optimizer: {momentum: 0.9}", "train.optimizer: momentum (0.9) is muon's, and adamw has betas instead: remove it, or write kind: muon"),
        ("  optimizer: {kind: muon, momentum: 1}", "train.optimizer.momentum: should be less than 1 (got 1)"),
        ("layout: {offload: gpu}", "layout.offload: should be none, cpu or disk (got 'gpu') - did you mean 'cpu'?"),
        ("serve: nothing", "serve: should be a section with keys such as host, port, streams (got 'nothing')"),
        ("track: &t [*t]", "nested deeper than 32 levels"),
        ("? [a, b]\n: c", "a key should be a word, not a list or mapping"),
        ("train: {tokens: 1}", "train: duplicate key (first on line 6)"),
        ("checkpoint: {<<: {keep: 1}}", "checkpoint.<<: merge keys are not supported: write the keys themselves"),
        ("track: *nobody", "not valid YAML: found undefined alias 'nobody'"),
        ("---\nname: x", "not valid YAML: expected a single document in the stream, but found another document"),
    ],
)  # fmt: skip
def test_faults_of_later_sections(problems, tail: str, said: str) -> None:
    assert problems(f"{GOOD}{tail}\n") == [f"run.yaml:9: {said}"]


@pytest.mark.parametrize(
    ("said", "read"),
    [("20 steps", Every(steps=20)), ("10s", Every(seconds=10.0)), ("auto", "auto"), ("none", "none")],
)
def test_copies_in_memory(said: str, read: object, write) -> None:
    run = load_run(write(GOOD + f"checkpoint: {{memory: {said}, replicas: 0}}\n"))
    assert (run.checkpoint.memory, run.checkpoint.replicas) == (read, 0)
    assert load_resolved(run.to_dict()) == run


def test_how_checkpoints_are_spaced_and_kept(write) -> None:
    said = "checkpoint: {every: auto, keep_every: 1000 steps, keep_best: true}\n"
    run = load_run(write(GOOD + "  eval_every: 50 steps\n" + said))
    assert (run.checkpoint.every, run.checkpoint.keep_every) == ("auto", Every(steps=1000))
    assert load_resolved(run.to_dict()) == run


def test_the_best_needs_evaluations(problems) -> None:
    assert problems(GOOD + "checkpoint: {keep_best: true}\n") == [
        "run.yaml:1: checkpoint.keep_best needs evaluations during training: set train.eval_every, for example to 100 steps, or remove keep_best"
    ]
    held_out = GOOD.replace("  tokenizer", "  held_out: 0%\n  tokenizer")
    assert problems(held_out + "  eval_every: 50 steps\ncheckpoint: {keep_best: true}\n") == [
        "run.yaml:1: checkpoint.keep_best needs held-out documents, but data.held_out is 0: set it, for example to 2%"
    ]


def test_what_one_section_forbids_another(problems) -> None:
    assert problems(GOOD + "  optimizer: {kind: muon}\nlayout: {offload: disk}\n") == [
        "run.yaml:1: layout.offload: disk streams AdamW's two moments, but train.optimizer.kind is muon, which keeps one: write offload: cpu, or kind: adamw"
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "run.yaml:1: the file is empty; `muster init NAME` writes one to start from"),
        ("# nothing\n", "run.yaml:1: the file is empty; `muster init NAME` writes one to start from"),
        ("- a\n", "run.yaml:1: should be a mapping with name, model, data and train"),
        (b"name: \xff\n", "run.yaml: is not UTF-8 text (byte 6): save it as UTF-8"),
        (b"name: x\n\0", "run.yaml:2: not valid YAML: the character 0 is not allowed"),
        ("a: [1, 2\nb: 3}\n", "run.yaml:2: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("a: " + "[" * 1500, "run.yaml:1: nested deeper than 32 levels"),
        ("#" * 1_000_000, "run.yaml: has more than 262144 bytes, so it is no run file: give a YAML file"),
    ],
)  # fmt: skip
def test_what_is_no_run_file(problems, content: str | bytes, said: str) -> None:
    assert problems(content) == [said]


def test_aliases_cannot_stand_for_billions_of_values(problems) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert problems("\n".join(lines)) == ["run.yaml:1: stands for more than 10000 values"]


def test_anchors_and_a_byte_order_mark_are_fine(write) -> None:
    text = GOOD.replace("4k", "&batch 4k\n  eval_tokens: *batch")
    assert load_run(write(b"\xef\xbb\xbf" + text.encode())).train.eval_tokens == 4000


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", "nowhere/run.yaml"])
def test_a_file_that_cannot_be_read(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"^{path}: (there is no such file|cannot be read)"):
        load_run(Path(path))


def test_overrides(write) -> None:
    run = load_run(
        write(GOOD + "layout: auto\n"),
        [
            "train.optimizer.lr=1e-3",
            "layout.shard=2",
            "layout.zero=3",
            "data.train.0.weight=2",
            "data.train.0.files=**/*.py",
            "train.tokens=4Ki",
            "checkpoint.every=100 steps",
            "serve={port: 0, streams: 2}",
            "train.seed=1",
            "train.seed=2",
        ],
    )
    assert run.train.optimizer.lr == 1e-3
    assert run.layout == Layout(shard=2, zero=3)
    assert (run.data.train[0].weight, run.data.train[0].files) == (2, "**/*.py")
    assert (run.train.tokens, run.train.seed, run.serve.port) == (4096, 2, 0)
    assert run.checkpoint.every == Every(steps=100)


def test_an_override_takes_a_section_back_to_a_word(write) -> None:
    assert load_run(write(GOOD + "layout: {shard: 2}\n"), ["layout=auto"]).layout == "auto"


def test_an_override_may_mend_the_file(write) -> None:
    assert load_run(write(GOOD.replace("4k", "4z")), ["train.batch_tokens=4k"]).train.batch_tokens == 4000


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=3", "train.lr: unknown key - 'lr' belongs in train.optimizer or train.sync.outer"),
        ("layout.shrd=2", "layout.shrd: unknown key - did you mean 'shard'?"),
        ("serv.port=1", "serv: unknown key - did you mean 'serve'?"),
        ("distill.x=3", "distill: not in this version of muster: remove it"),
        ("serve.port=99999", "serve.port: should be at most 65535 (got 99999)"),
        ("model.heads=5", "model: heads (5) must divide width (64): nearest legal width is 65"),
        ("data.train.5.weight=2", "data.train is a list of 1, counted from 0, and has no 5"),
        ("data.train.x.weight=2", "data.train is a list of 1, counted from 0, and has no x"),
        ("data.train.0=x", "data.train.0: should be a section with keys such as files, hf, exclude (got 'x')"),
        ("layout={shard: 2, shard: 3}", "layout.shard: duplicate key (first on line 1)"),
        ("layout={shard: 2", "not valid YAML: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"),
        ("train.tokens=", "train.tokens: should be a quantity such as 4096, 4k, 4Ki, 1.5M or 2B (got nothing)"),
        ("tokens", "should have the form key.path=value"),
        ("=3", "should have the form key.path=value"),
        ("train..tokens=3", "should have the form key.path=value"),
    ],
)  # fmt: skip
def test_faults_of_overrides_name_the_override(problems, override: str, said: str) -> None:
    assert problems(GOOD, override)[-1] == f"override '{override}': {said}"


def test_all_faulty_overrides_are_told(problems) -> None:
    found = problems(GOOD + "foo: 1\n", "x", "y", "layout.zero=9")
    assert [line.partition(":")[0] for line in found] == [
        "run.yaml",
        "override 'x'",
        "override 'y'",
        "override 'layout.zero=9'",
    ]


def test_the_latest_of_several_overrides_answers(problems) -> None:
    found = problems(GOOD, "layout={shard: 2}", "layout.shard=3", "layout.shard=x")
    assert found == ["override 'layout.shard=x': layout.shard: should be a whole number (got 'x')"]


def test_a_resolved_run_reads_back_equal(write) -> None:
    run = load_run(write(GOOD + "  eval_every: 90s\nlayout: {shard: 2}\ncheckpoint: {every: 0.1s}\n"))
    assert load_resolved(run.to_dict()) == run
    assert isinstance(run, Run)


def test_a_resolved_run_of_another_version_is_refused_without_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        load_resolved({"name": "x", "later": 1})
    assert "run.json: later: unknown key" in str(caught.value)
