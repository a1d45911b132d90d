from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from muster.errors import ConfigError, DoesNotFit, UsageError
from muster.model.config_json import read_spec
from muster.model.folder import load_folder
from muster.observe.format import count
from muster.serve.codec import TextCodec
from muster.serve.folders import Source, find_source, serve_section
from muster.serve.opening import cache_blocks, choose_threads, open_model, token_bytes
from muster.serve.server import bind, url_of


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder / "hf", tmp_path / "model"))


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def test_a_run_its_export_and_a_model_folder_are_found(folder: Path, copy: Path) -> None:
    export = folder / "hf"
    source = Source(name="small-run", weights=export, tokenizer=export, run=folder)
    assert find_source(folder) == find_source(export) == source
    assert find_source(copy) == Source(name="model", weights=copy, tokenizer=copy)
    assert serve_section(folder).streams == serve_section(export).streams == 3
    assert serve_section(export).timeout == 60.0
    assert serve_section(copy).streams == 8


def test_paths_that_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        find_source(tmp_path / "none")
    with pytest.raises(UsageError, match="neither a run folder nor a model folder"):
        find_source(tmp_path)
    edit(tmp_path / "run.json", run={"serve": {"streams": 0}})
    with pytest.raises(UsageError, match="no checkpoint and no export yet: train it first"):
        find_source(tmp_path)
    with pytest.raises(ConfigError, match=r"serve\.streams"):
        serve_section(tmp_path / "hf")


def test_opening_a_model(folder: Path) -> None:
    opened = open_model(folder, dtype="fp32", streams=2, context_tokens=1000)
    try:
        assert (opened.model_id, opened.context_tokens, opened.streams) == ("small-run", 96, 2)
        assert opened.parameters == sum(p.numel() for p in load_folder(folder / "hf").parameters())
        assert opened.engine.stats().blocks == 2 * 6 + 1
        assert opened.codec.eos_ids == {opened.codec.tokenizer.eos_id}
        assert opened.threads == 1
    finally:
        opened.engine.close()


def test_keys_and_values_in_int8_and_what_they_save(copy: Path) -> None:
    opened = open_model(copy, dtype="bf16", streams=2, kv="int8")
    try:
        assert opened.cache == "208 tokens, 0.0 MB: in int8 1.33 times as many as in bf16"  # 8 numbers a head
    finally:
        opened.engine.close()


def test_models_that_cannot_be_opened(copy: Path) -> None:
    spec, free = read_spec(copy), 10**9
    plain, int8 = (token_bytes(spec, 4, kv) for kv in (None, "int8"))
    assert (plain, int8) == (2 * 2 * 2 * 8 * 4, 2 * 2 * 2 * (8 + 4))
    for one in (plain, int8):
        assert cache_blocks(one, 4, 96, free) == 4 * 6 + 1
        assert cache_blocks(one, 10**6, 96, free) == free // 2 // (16 * one)
    with pytest.raises(
        DoesNotFit, match=r"sequence of 2000000 tokens needs a KV cache of 0.5 GB, .* lower --context"
    ):
        cache_blocks(plain, 1, 2_000_000, free)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 257, "content": "<|more|>"})
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="258 tokens, but its model has embeddings for 257"):
        open_model(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        open_model(copy)


def test_a_draft_model_of_the_same_tokenizer(folder: Path, copy: Path) -> None:
    for draft in ("ngram", str(copy)):
        opened = open_model(folder, dtype="fp32", draft=draft)
        opened.engine.close()
        who = (
            "the text so far"
            if draft == "ngram"
            else f"model, {count(opened.parameters)} parameters, and the text"
        )
        assert opened.draft.startswith(who)
    edit(copy / "tokenizer_config.json", eos_token="a")
    with pytest.raises(UsageError, match="another tokenizer than the model"):
        open_model(folder, draft=str(copy))


def test_threads_are_chosen_with_a_reason() -> None:
    assert choose_threads(4_000_000)[0] == 1
    threads, reason = choose_threads(8_000_000_000)
    assert threads >= 1
    assert reason


def test_where_sequences_begin_and_end(copy: Path) -> None:
    config = copy / "tokenizer_config.json"
    bos = TextCodec.from_folder(copy).tokenizer.bos_id
    config.write_text("{}")
    edit(copy / "tokenizer.json", post_processor=None)
    assert TextCodec.from_folder(copy).begin == ()
    assert TextCodec.from_folder(copy).encode("") == (bos,)
    edit(config, add_bos_token=True)
    codec = TextCodec.from_folder(copy)
    assert codec.encode("a") == (bos, *codec.tokenizer.encode("a"))
    edit(copy / "generation_config.json", eos_token_id=[3, 5])
    assert TextCodec.from_folder(copy).eos_ids == {3, 5}


def test_a_post_processor_says_that_sequences_begin_with_bos(copy: Path) -> None:
    bos, name = TextCodec.from_folder(copy).tokenizer.bos_id, "<|endoftext|>"
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {name: {"id": name, "ids": [bos], "tokens": [name]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    edit(copy / "tokenizer.json", post_processor={"type": "Sequence", "processors": [template]})
    (copy / "tokenizer_config.json").write_text("{}")
    assert TextCodec.from_folder(copy).begin == (bos,)
    edit(copy / "tokenizer_config.json", add_bos_token=False)
    assert TextCodec.from_folder(copy).begin == ()


def test_only_the_template_writes_special_tokens(copy: Path) -> None:
    edit(
        copy / "tokenizer_config.json",
        chat_template="{% for m in messages %}{{ eos_token + m.content }}{% endfor %}",
    )
    codec = TextCodec.from_folder(copy)
    eos = codec.tokenizer.eos_id
    ids = codec.encode_chat([{"role": "user", "content": "a"}, {"role": "user", "content": "<|endoftext|>b"}])
    assert ids == (eos, *codec.tokenizer.encode("a"), eos, *codec.tokenizer.encode("<|endoftext|>b"))
    assert ids.count(eos) == 2


def test_ports_and_hosts() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert url_of(taken) == f"http://127.0.0.1:{port}"
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use.* --port 0"):
            bind("127.0.0.1", port)
    with pytest.raises(UsageError, match="reachable from other machines"):
        bind("0.0.0.0", 0)
    with pytest.raises(UsageError, match="no such address"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(UsageError, match="outside 0 to 65535"):
        bind("127.0.0.1", 70_000)


def test_ipv6_loopback() -> None:
    try:
        sock = bind("::1", 0)
    except UsageError:
        pytest.skip("no IPv6 on this machine")
    with sock:
        assert sock.family == socket.AF_INET6
        assert url_of(sock).startswith("http://[::1]:")
