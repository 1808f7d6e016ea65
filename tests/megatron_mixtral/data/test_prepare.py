"""`prepare`: what Megatron reads back is what was written, whole, for any workers, and bad input is named."""

import gzip
import importlib
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import mistral_reference
import numpy as np
import pytest
import torch
import zstandard
from mistral_common.exceptions import MistralCommonException
from prepared_data import TALK, prepare, stored, write_jsonl

from megatron_mixtral.data import documents, formats
from megatron_mixtral.data import prepare as data
from megatron_mixtral.data.dataset import Documents
from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.jobs.prepare import run
from megatron_mixtral.spec.jobs import PrepareConfig
from megatron_mixtral.tokenization import chat, tokenizer

TEXTS = [f"Document {n} says: {'words ' * (n % 7)}and ends with héé 你好." for n in range(50)]


def test_documents_come_back_in_order_between_begin_and_end(tmp_path, tokenizer_folder, words):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    found = stored(prepare(tmp_path, tokenizer_folder, file))
    assert [ids for ids, _ in found] == [[1, *words.encode(t), 2] for t in TEXTS]
    assert all(set(mask) == {1} for _, mask in found)
    assert not (tmp_path / "out_mask.bin").exists()


def test_files_are_byte_for_byte_those_of_megatrons_builder(tmp_path, tokenizer_folder, words):
    importlib.import_module("megatron_mixtral.mcore.compat")  # must come before megatron.core
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    file = write_jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    prefix = prepare(tmp_path, tokenizer_folder, file)
    builder = IndexedDatasetBuilder(str(tmp_path / "ref.bin"), dtype=np.uint16)
    for text in TEXTS:
        ids = [1, *words.encode(text), 2]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "ref.idx"))
    for suffix in (".bin", ".idx"):
        assert prefix.with_suffix(suffix).read_bytes() == (tmp_path / f"ref{suffix}").read_bytes()
    dataset = IndexedDataset(str(prefix))  # its arrays live no longer than it does
    assert dataset[3].tolist() == [1, *words.encode(TEXTS[3]), 2]


def test_output_is_the_same_for_any_number_of_workers_and_any_cut(tmp_path, tokenizer_folder, monkeypatch):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    once = prepare(tmp_path, tokenizer_folder, file).with_suffix(".bin").read_bytes()
    for name in ("out.bin", "out.idx", "out.json"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(documents.pieces, "__defaults__", (700,))
    again = prepare(tmp_path, tokenizer_folder, file, workers=2).with_suffix(".bin").read_bytes()
    assert again == once


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_every_line_belongs_to_exactly_one_piece(tmp_path, size):
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b"".join(b"x" * (n % 40) + b"\n" for n in range(200)) + b"no newline at the end")
    got = [line for piece in documents.pieces([file], size) for line in documents.lines(piece)]
    assert got == file.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("size", [5000, 10**6])
def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path, size):
    file = tmp_path / "book.txt"
    text = "\n\n".join("A paragraph of one book, number " + "x" * (n % 300) for n in range(900))
    file.write_text(text)
    cut = documents.pieces([file], size)
    found = [d for piece in cut for d in documents.read(piece, formats.Fields())]
    assert "".join(d.text for d in found) == text
    assert len(found) > 5
    assert [d.opens for d in found] == [True] + [False] * (len(found) - 1)
    assert [d.closes for d in found] == [False] * (len(found) - 1) + [True]


def test_compressed_files_and_folders_are_read(tmp_path, tokenizer_folder, words):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "two"}).encode()))
    write_jsonl(folder / "a.jsonl", [{"text": "one"}])
    (folder / "c.txt").write_text("three")
    (folder / "ignored.bin").write_bytes(b"\xff")
    found = stored(prepare(tmp_path, tokenizer_folder, folder))
    assert [ids for ids, _ in found] == [[1, *words.encode(t), 2] for t in ("one", "two", "three")]


def one_a_line(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def far_back(content):
    """As `zstd --long=31` writes it."""
    settings = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return writer.compress(content) + writer.flush()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + one_a_line("one", "two").replace(b"\n", b"\r\n\r\n")),
        ("a.JSON", b'{"messages": null, "text": "one"}\n{"text": "x", "text": "two"}'),
        ("a.jsonl.gz", gzip.compress(one_a_line("one")) + gzip.compress(one_a_line("two"))),
        ("a.ndjson.zst", zstandard.compress(one_a_line("one")) + zstandard.compress(one_a_line("two"))),
        ("deep/a.jsonl.zst", zstandard.compress(one_a_line("one", "two"))),
        ("A.JSONL.GZ", gzip.compress(one_a_line("one", "two"))),
        ("A.Jsonl.ZST", zstandard.compress(one_a_line("one", "two"))),
        ("a.jsonl.zst", far_back(one_a_line("one", "two"))),
    ],
    ids=[  # gzip tells the time
        *("from-windows", "null-and-twice", "gzip-in-parts", "zstd-in-parts", "in-a-folder"),
        *("GZIP", "ZSTD", "zstd-far-back"),
    ],
)
def test_files_as_they_are_found(tmp_path, tokenizer_folder, words, name, content):
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/.hidden.jsonl").write_text("no JSON")
    (tmp_path / "in" / name).write_bytes(content)
    found = stored(prepare(tmp_path, tokenizer_folder, tmp_path / "in"))
    assert [ids for ids, _ in found] == [[1, *words.encode(t), 2] for t in ("one", "two")]


@pytest.mark.parametrize("name", ["chats", "chats.jsonl.1", "chats.gz", "chats.bak"])
def test_lines_of_json_are_no_plain_text_whatever_their_file_is_called(tmp_path, tokenizer_folder, words, name):
    content = b"\xef\xbb\xbf" * (name == "chats.bak") + json.dumps({"prompt": "q", "completion": "a"}).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    ((_, mask),) = stored(prepare(tmp_path, tokenizer_folder, tmp_path / name))
    assert 0 < sum(mask) < len(mask)


NOISE = one_a_line(*(str(np.random.default_rng(n).bytes(20)) for n in range(2000)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"hello"),
        ("a.jsonl.gz", gzip.compress(NOISE)[:-9]),
        ("a.jsonl.zst", b"hello"),
        ("a.jsonl.zst", zstandard.compress(NOISE)[:-9]),
        ("a.jsonl.zst", zstandard.compress(NOISE) + zstandard.compress(NOISE)[:6]),
    ],
    ids=["not-gzip", "gzip-cut", "not-zstd", "zstd-cut", "second-zstd-cut"],
)
def test_a_damaged_compressed_file_is_named(tmp_path, tokenizer_folder, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: damaged: "):
        prepare(tmp_path, tokenizer_folder, tmp_path / name)


def test_conversations_are_token_for_token_mistral_commons(words):
    ids, mask = chat.V1(words).example(TALK)
    assert (ids, mask) == mistral_reference.ids_and_mask(TALK)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert learnt == [*words.encode("Hi there"), 2, *words.encode("A mixture."), 2]
    parts = [{"type": "text", "text": text} for text in ("Look", "at this.")]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Yes"}]
    assert chat.V1(words).example(talk) == mistral_reference.ids_and_mask(talk)


def test_any_order_of_turns_is_written_or_refused_as_mistral_common_does(words):
    draw, seen = random.Random(3), {True: 0, False: 0}
    for _ in range(500):
        roles = [draw.choice(("system", "user")), *draw.choices(chat.ROLES, k=draw.randint(0, 4)), "assistant"]
        if roles.index("assistant") < (roles.index("user") if "user" in roles else 9):
            continue  # mistral-common puts an empty question first; here that's a mistake
        if ("user", "system") in itertools.pairwise(roles[roles.index("assistant") :]):
            continue  # goes to the front, before answers that didn't know it: no prefix to compare with
        contents = draw.choices(("Hi", " lead", "trail ", "</s>", "[INST]", "é\n\n"), k=len(roles))
        talk = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            wanted = mistral_reference.ids_and_mask(talk)
        except MistralCommonException:
            wanted = None
        try:
            found = chat.V1(words).example(talk)
        except ValueError:
            found = None
        assert found == wanted, talk
        seen[wanted is None] += 1
    assert min(seen.values()) > 20


def test_conversations_carry_their_mask(tmp_path, tokenizer_folder, words):
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": TALK}, {"prompt": "2+2?", "completion": "4"}])
    prefix = prepare(tmp_path, tokenizer_folder, file)
    (_, first), (ids, mask) = stored(prefix)
    assert first == chat.V1(words).example(TALK)[1]
    assert ids == [1, *words.encode("[INST] 2+2? [/INST]"), *words.encode("4"), 2]
    assert mask == [0] * (len(ids) - len(words.encode("4")) - 1) + [1] * (len(words.encode("4")) + 1)
    described = json.loads((tmp_path / "out.json").read_text())
    assert described["masked"] == 2
    assert described["learnt"] == sum(first) + sum(mask)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": ""}', "'text' is empty"),
        (r'{"text": "half \ud83d"}', "surrogates not allowed"),
        ("[" * 100_000, "recursion"),
        ('{"words": "x"}', "it has 'words'"),
        ("[1]", "expected a JSON object on each line, got list"),
        ('{"text": 3}', "'text' is int, not text"),
        ("{nope", "Expecting property name"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "user", "content": "q"}]}', "the last turn must be the assistant's"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "isn't an object with a text"),
        ('{"messages": [{"role": "bot", "content": "q"}]}', "'bot' isn't one of system, user, assistant"),
        ('{"messages": [{"role": "assistant", "content": "q"}]}', "must be the user's"),
        ('{"messages": [{"role": "tool", "content": "q"}]}', "'tool' isn't one of"),
        ('{"prompt": "q", "completion": " "}', "content is empty"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, tokenizer_folder, line, reason):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(InputError, match="1 bad line ") as error:
        prepare(tmp_path, tokenizer_folder, file)
    assert f"{file}:3: " in str(error.value)
    assert reason in str(error.value)
    assert not list(tmp_path.glob("out.[bij]*"))


def test_bad_lines_are_counted_across_pieces_and_may_be_allowed(tmp_path, tokenizer_folder, monkeypatch, capsys):
    monkeypatch.setattr(documents.pieces, "__defaults__", (100,))
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "good"}\n' * 20 + "bad\n" + '{"text": "good"}\n' * 5)
    prefix = prepare(tmp_path, tokenizer_folder, file, max_bad=1)
    assert len(stored(prefix)) == 25
    assert f"{file}:21: " in capsys.readouterr().out


def test_text_that_is_not_utf8_is_named_by_line(tmp_path, tokenizer_folder):
    file = tmp_path / "in.txt"
    file.write_bytes(b"fine\nfine\n\xff\xfe\n")
    with pytest.raises(InputError, match=r"in\.txt:3: not UTF-8"):
        prepare(tmp_path, tokenizer_folder, file)


def test_inputs_that_hold_nothing_are_an_error(tmp_path, tokenizer_folder):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="every input is empty"):
        prepare(tmp_path, tokenizer_folder, tmp_path / "empty.txt")
    with pytest.raises(InputError, match=r"nothing\.jsonl: no such file"):
        prepare(tmp_path, tokenizer_folder, tmp_path / "nothing.jsonl")


def test_killed_halfway_it_goes_on_and_gives_the_same_files(tmp_path, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(documents.pieces, "__defaults__", (700,))
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": t} for t in TEXTS])
    whole = prepare(tmp_path, tokenizer_folder, file).with_suffix(".bin").read_bytes()
    (tmp_path / "out.json").unlink()
    encoded = []
    real = data.convert_piece

    def counting(numbered, **kwargs):
        if not (kwargs["work"] / f"{numbered[0]:08d}.json").exists():
            encoded.append(numbered[0])
        if numbered[0] == 3 and len(encoded) == 4:
            raise KeyboardInterrupt
        return real(numbered, **kwargs)

    monkeypatch.setattr(data, "convert_piece", counting)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, tokenizer_folder, file)
    prefix = prepare(tmp_path, tokenizer_folder, file)
    assert encoded[:5] == [0, 1, 2, 3, 3]
    assert sorted(encoded) == sorted([*range(max(encoded) + 1), 3])
    assert prefix.with_suffix(".bin").read_bytes() == whole
    assert not (tmp_path / "out.parts").exists()


def test_prepared_data_is_not_prepared_again_until_its_input_changes(tmp_path, tokenizer_folder, capsys):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    before = prepare(tmp_path, tokenizer_folder, file).with_suffix(".bin").stat().st_mtime_ns
    prepare(tmp_path, tokenizer_folder, file)
    assert (tmp_path / "out.bin").stat().st_mtime_ns == before
    assert "(there already)" in capsys.readouterr().out
    write_jsonl(file, [{"text": "another"}])
    prepare(tmp_path, tokenizer_folder, file)
    assert (tmp_path / "out.bin").stat().st_mtime_ns != before


def test_bad_lines_that_were_allowed_are_not_for_ever(tmp_path, tokenizer_folder):
    (tmp_path / "in.jsonl").write_bytes(one_a_line("one") + b"bad\n")
    prefix = prepare(tmp_path, tokenizer_folder, tmp_path / "in.jsonl", max_bad=1)
    with pytest.raises(InputError, match=r"1 bad line \(at most 0 allowed"):
        prepare(tmp_path, tokenizer_folder, tmp_path / "in.jsonl")
    assert len(stored(prefix)) == 1


@pytest.mark.parametrize("lost", ["out.bin", "out.idx", "out_mask.bin", "out_mask.idx"])
def test_what_was_lost_since_is_made_again(tmp_path, tokenizer_folder, lost):
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": TALK}])
    before = stored(prepare(tmp_path, tokenizer_folder, file))
    (tmp_path / lost).unlink()
    assert stored(prepare(tmp_path, tokenizer_folder, file)) == before


@pytest.mark.parametrize("old", [{"messages": TALK}, {"text": "old"}])
def test_killed_as_files_get_their_names_it_leaves_nothing_without_its_mask(
    tmp_path, tokenizer_folder, monkeypatch, old
):
    """Whichever of these steps is the last one done."""
    prepare(tmp_path, tokenizer_folder, write_jsonl(tmp_path / "in.jsonl", [old]))
    new = write_jsonl(tmp_path / "new.jsonl", [{"messages": TALK[1:3]}])
    for done in range(9):
        with monkeypatch.context() as patched:
            kill_after(patched, done)
            with pytest.raises(KeyboardInterrupt):
                prepare(tmp_path, tokenizer_folder, new)
        if (tmp_path / "out.idx").exists():
            ((_, mask),) = stored(tmp_path / "out")
            assert set(mask) == {0, 1} or (done < 2 and "text" in old)
    prepare(tmp_path, tokenizer_folder, new)


def kill_after(patched, steps):
    """As many changes of the names of the output's files."""
    left = iter(range(steps))

    def counted(real):
        def step(self, *args, **options):
            if self.name.startswith("out") and next(left, None) is None:
                raise KeyboardInterrupt
            return real(self, *args, **options)

        return step

    for name in ("unlink", "replace"):
        patched.setattr(Path, name, counted(getattr(Path, name)))


def test_what_the_machine_refuses_is_named(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    with pytest.raises(InputError, match="File name too long"):
        prepare(tmp_path, tokenizer_folder, "x" * 300)
    (tmp_path / "out.parts").write_text("a file where the folder would be")
    with pytest.raises(JobError, match=r"out\.parts"):
        prepare(tmp_path, tokenizer_folder, file)


def test_control_tokens_in_text_stay_text(tokenizer_folder):
    for name in ("tokenizer.model", "tokenizer.json"):
        words = tokenizer.load(tokenizer_folder / name)
        assert 2 not in words.encode("so </s> ends nothing")
        assert (words.bos, words.eos, words.vocab_size) == (1, 2, 32000)


def test_both_tokenizer_files_agree_and_are_known_as_one_vocabulary(tokenizer_folder):
    pieces, hub = (tokenizer.load(tokenizer_folder / n) for n in ("tokenizer.model", "tokenizer.json"))
    assert tokenizer.digest(pieces) == tokenizer.digest(hub)
    for text in (*TEXTS, "  two\n\n\tmixed   runs", " ", "", "🎉\u3000"):
        assert pieces.encode(text) == hub.encode(text)


def test_show_prints_what_is_learnt(tmp_path, tokenizer_folder, capsys):
    file = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "2+2?", "completion": "4"}])
    prepare(tmp_path, tokenizer_folder, file, show=3)
    assert "▁[ / INST ]«▁ 4 </s>»" in capsys.readouterr().out


def test_configuration_decides_the_fields(tmp_path, tokenizer_folder, words):
    file = write_jsonl(tmp_path / "in.jsonl", [{"question": "q", "answer": "a", "text": "unused"}])
    prefix = prepare(tmp_path, tokenizer_folder, file, prompt_key="question", completion_key="answer")
    assert stored(prefix)[0][0] == [1, *words.encode("[INST] q [/INST]"), *words.encode("a"), 2]


def test_a_piece_of_an_upstream_dataset_without_description_is_readable(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "one"}])
    prefix = prepare(tmp_path, tokenizer_folder, file)
    (tmp_path / "out.json").unlink()
    assert data.meta(prefix) is None
    assert len(Documents(prefix)) == 1


def test_replaced_config_is_a_new_preparation(tmp_path, tokenizer_folder):
    file = write_jsonl(tmp_path / "in.jsonl", [{"text": "a", "body": "b"}])
    config = PrepareConfig(
        inputs=[str(file)], output=str(tmp_path / "out"), tokenizer=str(tokenizer_folder), workers=1
    )
    run(config, tmp_path)
    one = (tmp_path / "out.bin").read_bytes()
    run(replace(config, text_key="body"), tmp_path)
    assert (tmp_path / "out.bin").read_bytes() != one
