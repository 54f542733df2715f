"""The text files that the examples read: lists, indexes, configurations, however an editor saved them."""

import json
import shutil
import unicodedata

import numpy as np
import pytest

for _name in ("av", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(_name)

from examples import videos
from examples.moving_digits import write_video
from examples.training import MetricsLog, UserError, from_json, load_config, read_json, read_text
from examples.video_training import RunConfig
from examples.videos import ClipConfig, index_videos, read_lists

pytestmark = pytest.mark.compiled
LISTS = {"classInd.txt": "1 A\n2 B\n", "trainlist01.txt": "A/v.avi 1\n", "testlist01.txt": "B/v.avi\n"}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32")


def encoded(text: str, encoding: str) -> bytes:
    return (("\ufeff" if encoding == "utf-16-be" else "") + text).encode(encoding)


def write_lists(folder, encoding="utf-8", **changed):
    for name, text in (LISTS | {f"{key}.txt": text for key, text in changed.items()}).items():
        (folder / name).write_bytes(encoded(text, encoding))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " \t\r\n\r\n \n"])
def test_lists_as_editors_save_them(tmp_path, encoding, end):
    write_lists(
        tmp_path,
        encoding,
        classInd=end.join(["1 Apply Makeup", "2 \u00c9p\u00e9e", "3\tC:D", ""]),
        trainlist01=end.join(["Apply Makeup/v a.AVI 1", "\ufeffC:D/12:30.Mp4\t3", "\u00c9p\u00e9e/no suffix  2"]),
        testlist01=end.join(["", "\u00c9p\u00e9e/caf\u00e9 1.avi ", "Apply Makeup/part 2"]),
    )
    lists = read_lists(tmp_path, 1)
    assert lists.classes == ["Apply Makeup", "\u00c9p\u00e9e", "C:D"]
    assert lists.train == [("Apply Makeup/v a.AVI", 0), ("C:D/12:30.Mp4", 2), ("\u00c9p\u00e9e/no suffix", 1)]
    assert lists.test == [("\u00c9p\u00e9e/caf\u00e9 1.avi", 1), ("Apply Makeup/part 2", 0)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("trainlist01.txt", None, "cannot read .*trainlist01.txt: No such file"),
        ("trainlist01.txt", "A/v.avi 1\nNope/v.avi 1\n", "trainlist01.txt, line 2: class 'Nope'"),
        ("trainlist01.txt", "A/v.avi 2\n", "line 1: class 'A' has number 1, not 2"),
        ("trainlist01.txt", "A/v.avi\n", "line 1: expected 'CLASS/NAME NUMBER', got 'A/v.avi'"),
        ("testlist01.txt", "A/v.avi\n\nNope/v.avi\n", "testlist01.txt, line 3: class 'Nope'"),
        ("testlist01.txt", "A/v.avi 1\n", "line 1: expected 'CLASS/NAME' without a number, got 'A/v.avi 1'"),
        ("classInd.txt", "1 A\n3 B\n", "classInd.txt, line 2: expected '2 CLASS', got '3 B'"),
        ("classInd.txt", "1 A\n2\n", "classInd.txt, line 2: expected '2 CLASS', got '2'"),
        ("classInd.txt", "1 A\n2 A\n", "line 2: class 'A' has number 1 already"),
        ("classInd.txt", "1 A\n\u200b2 B\n", r"line 2: expected '2 CLASS', got '\\u200b2 B'"),
    ],
)
def test_lists_report_file_and_line(tmp_path, file, text, message):
    write_lists(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_lists(tmp_path, 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("1 É".encode("latin-1"), "text.txt is not text in UTF-8, unexpected end of data at byte 2: save it as UTF-8"),
        ("1 É\n".encode("latin-1"), "text.txt is not text in UTF-8, invalid continuation byte at byte 2"),
        (b"\xff\xfe1\0 ", "text.txt is not text in UTF-16, truncated data at byte 4: save it as UTF-8"),
        ("1 A".encode("utf-16-le"), "text.txt holds null characters, as text in UTF-16 without a byte order mark"),
    ],
)
def test_text_in_other_encodings_is_named(tmp_path, data, message):
    (tmp_path / "text.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "text.txt")


def test_index_names_broken_videos_and_is_cached(tmp_path, monkeypatch):
    (tmp_path / "C").mkdir()
    write_video(tmp_path / "C/good.avi", np.zeros((8, 32, 32), np.uint8))
    (tmp_path / "C/empty.avi").touch()
    (tmp_path / "C/text.avi").write_text("no video\n" * 100)
    names = [(f"C/{name}.avi", 0) for name in ("good", "empty", "text", "gone")]
    cache = tmp_path / "index.json"
    found, broken = index_videos(tmp_path, names, cache)
    assert [video.path.name for video in found] == ["good.avi"] and found[0].frames == 8
    assert [next(n for n in ("empty", "text", "gone") if n in line) for line in broken] == ["empty", "text", "gone"]
    monkeypatch.setattr(videos, "probe", lambda path: pytest.fail(f"{path} was decoded again"))
    assert index_videos(tmp_path, names, cache) == (found, broken)
    cache.write_bytes(encoded(cache.read_text(), "utf-8-sig"))
    assert index_videos(tmp_path, names, cache) == (found, broken)


def test_lists_and_videos_from_systems_that_do_not_tell_names_apart(tmp_path):
    """macOS took accents apart, Windows and macOS take .AVI for .avi; where two files are meant alike, none is."""
    folder = tmp_path / unicodedata.normalize("NFD", "Épée")
    write_video(folder / "a.AVI", np.zeros((2, 32, 32), np.uint8))
    for name in ("b.AVI", "b.Avi"):
        shutil.copy(folder / "a.AVI", folder / name)
    names = [(f"{unicodedata.normalize('NFC', 'Épée')}/{name}", 0) for name in ("a.avi", "b.avi", "b.Avi")]
    found, (said,) = index_videos(tmp_path, names, tmp_path / "index.json")
    assert [video.path.name for video in found] == ["a.AVI", "b.Avi"] and "b.avi cannot be read" in said
    assert index_videos(tmp_path, names, tmp_path / "index.json") == (found, [said])


GOOD = {"bytes": 9, "modified_ns": 9, "frames": 9, "height": 9, "width": 9}


@pytest.mark.parametrize(
    "text",
    [
        *["", "[1]", "null", "3", '"a"', '{"a.avi": ', "{" * 3, "[" * 100_000, "\0"],
        *[
            json.dumps(value)
            for value in ({"videos": []}, {"a.avi": 3}, {"a.avi": None}, {"version": 1}, {"a.avi": {}})
        ],
        *[
            json.dumps({"a.avi": GOOD | {name: value}})
            for name, value in (("frames", "9"), ("width", 0), ("bytes", [9]))
        ],
        json.dumps({"a.avi": GOOD, "b.avi": {"error": 3}}),
        json.dumps({"a.avi": GOOD | {"height": True}}),
    ],
    ids=lambda text: text[:40],
)
def test_an_index_of_another_kind_is_named_and_kept(tmp_path, text):
    write_video(tmp_path / "a.avi", np.zeros((2, 32, 32), np.uint8))
    cache = tmp_path / "mine.json"
    cache.write_text(text)
    with pytest.raises(UserError, match=r"mine.json .*; delete it to index .* or name another file with --index"):
        index_videos(tmp_path, [("a.avi", 0)], cache)
    assert cache.read_text() == text


@pytest.mark.parametrize("text", ["[]", '"x"', '{"flip_changes_class": tr', "null", '{"flip_changes_class": "no"}'])
def test_a_dataset_file_of_another_kind_is_named(tmp_path, text):
    write_lists(tmp_path)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(
        UserError,
        match=r"dataset.json( is not valid JSON|: flip_changes_class must be true or false| does not hold a JSON)",
    ):
        read_lists(tmp_path, 1)
    (tmp_path / "dataset.json").write_bytes(encoded('{"flip_changes_class": true}', "utf-16"))
    assert read_lists(tmp_path, 1).flip_changes_class


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda saved: [saved], "does not hold a JSON object"),
        (lambda saved: {}, "is not the configuration of a video classifier: it lacks 'model'"),
        (lambda saved: saved | {"model": [1]}, r"ModelConfig must be an object, got \[1\]"),
        (lambda saved: saved | {"clip": {"frames": "10"}}, "frames must be of type int, got '10'"),
        (lambda saved: saved | {"clip": {"frames": True}}, "frames must be of type int, got True"),
        (lambda saved: saved | {"clip": {"fps": 10}}, "unexpected keyword argument 'fps'"),
        (lambda saved: saved | {"classes": "AB"}, "classes must be a list of 2 names"),
        (lambda saved: saved | {"classes": ["A"]}, "classes must be a list of 2 names"),
    ],
)
def test_a_configuration_of_another_kind_is_named(tmp_path, change, message):
    names = dict.fromkeys(("videos", "lists"), "x")
    numbers = dict.fromkeys(("fold", "epochs", "batch_size", "lr", "weight_decay", "seed"), 1)
    saved = {"model": {"classes": 2}, "clip": {}, "train": names | numbers | {"flip": True, "val_fraction": 0.5}}
    saved["classes"] = ["A", "B"]
    (tmp_path / "config.json").write_bytes(encoded(json.dumps(saved), "utf-8-sig"))
    assert load_config(tmp_path, "a video classifier", RunConfig.from_json).train.fold == 1
    (tmp_path / "config.json").write_text(json.dumps(change(saved)))
    with pytest.raises(UserError, match=rf"config.json .*{message}"):
        load_config(tmp_path, "a video classifier", RunConfig.from_json)


def test_from_json_takes_whole_numbers_for_real_ones():
    assert from_json(ClipConfig, {"frames": 3}) == ClipConfig(frames=3)
    with pytest.raises(TypeError, match="resize must be of type int, got 40.0"):
        from_json(ClipConfig, {"resize": 40.0})


def test_metrics_that_are_none_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"st')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 does not hold a JSON object, but '\[2\]'"):
        MetricsLog(tmp_path / "metrics.jsonl").rows()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    assert MetricsLog(tmp_path / "metrics.jsonl").rows() == [{"step": 1}]
    with pytest.raises(UserError, match="metrics.jsonl is not valid JSON"):
        read_json(tmp_path / "metrics.jsonl")
