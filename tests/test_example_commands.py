"""The command lines and environment variables of torch-mingru's examples, with the programs' names of here."""

import sys
from pathlib import Path

import pytest

for _name in ("av", "matplotlib", "safetensors", "sklearn", "tqdm"):
    pytest.importorskip(_name)

from examples import language_model, next_frame, selective_copying, video_classification
from examples.moving_digits import make_dataset
from examples.training import MetricsLog, UserError, exit_code, read_json
from examples.video_training import VARIABLES, data_folders

pytestmark = pytest.mark.compiled
TINY_VIDEOS = ["--epochs", 1, "--batch-size", 8, "--clip-frames", 2, "--resize", 32]
TINY_TEXT = ["--length", 8, "--features", 8, "--state", 8, "--layers", 1, "--batch-size", 2, "--steps", 2]


def command(program, *words) -> int:
    return exit_code(lambda: program.run([str(word) for word in words]))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    make_dataset(root, groups=4, clips=1, frames=4, size=32)
    return root


@pytest.fixture(autouse=True)
def outside(tmp_path, monkeypatch):
    """A folder to work in, and none of the variables set."""
    monkeypatch.chdir(tmp_path)
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


def test_video_classification(data, monkeypatch, capsys):
    """`train -f 1` and `test -f 1 CHECKPOINT`, the data by environment."""
    monkeypatch.setenv("UCF101_PATH", str(data / "videos"))
    monkeypatch.setenv("UCF101_ANNPATH", str(data / "lists"))
    assert command(video_classification, "train", "-f", 1, *TINY_VIDEOS) == 0
    run = Path("runs/moving_digits")
    trained = read_json(run / "config.json")["train"]
    assert (trained["videos"], trained["lists"], trained["fold"]) == (str(data / "videos"), str(data / "lists"), 1)
    few = ["--clips", 1, "--crops", 1]
    for words in (["-f", 1, run / "best.safetensors"], [run / "last.safetensors", "-f", 1], [run], ["--run", run]):
        assert command(video_classification, "test", *words, *few) == 0, words
    assert len(MetricsLog(run / "metrics.jsonl").rows()) == 1 + 4 and (run / "confusion.png").is_file()
    video = next((data / "videos").rglob("*.avi"))
    assert command(video_classification, "predict", "--run", run / "last.safetensors", *few, video) == 0

    capsys.readouterr()
    assert command(video_classification, "test", "-f", 2, run / "best.safetensors", *few) == 2
    said = "runs/moving_digits was trained on fold 1, and so on 8 of the 8 test videos of --fold 2"
    assert said in capsys.readouterr().err
    monkeypatch.setenv("UCF101_ANNPATH", str(Path.cwd()))
    for name, text in (("classInd.txt", "1 A\n"), ("trainlist01.txt", "A/a 1\n"), ("testlist01.txt", "A/b\n")):
        Path(name).write_text(text)
    assert command(video_classification, "test", run, *few) == 2
    said = f"was trained on other classes than {Path.cwd()}/classInd.txt lists: name its --lists"
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(video_classification, "test", "--run", "elsewhere", run / "best.safetensors")
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("program", [video_classification, language_model, next_frame])
@pytest.mark.parametrize("exists", [True, False])
def test_a_checkpoint_of_another_program_is_named(program, exists, capsys):
    Path("tmp").mkdir()
    if exists:
        Path("tmp/video_classifier_best.pt").touch()
    words = ["sample", "--num-tokens", 5] if program is language_model else ["test"]
    assert command(program, *words, "tmp/video_classifier_best.pt") == 2
    said = "is not a checkpoint in the folder of a run" if exists else "error: there is no checkpoint tmp/video_cl"
    err = capsys.readouterr().err
    assert said in err and "video_classifier_best.pt" in err and err.count("\n") == 1


def chosen(words: list[str]) -> tuple[str, str]:
    args = video_classification.parser().parse_args(words)
    return tuple(str(path) for path in data_folders(args, Path("default/videos"), Path("default/lists")))


@pytest.mark.parametrize("words", [["train"], ["test"]])
def test_option_over_environment_over_default(tmp_path, monkeypatch, words):
    assert chosen(words) == ("default/videos", "default/lists")
    monkeypatch.setenv("UCF101_PATH", "")
    assert chosen(words) == ("default/videos", "default/lists")
    monkeypatch.setenv("UCF101_PATH", str(tmp_path))
    with pytest.raises(UserError, match="UCF101_PATH is set and UCF101_ANNPATH is not: set both, or give --lists"):
        chosen(words)
    assert chosen([*words, "--lists", "x"]) == (str(tmp_path), "x")
    monkeypatch.setenv("UCF101_ANNPATH", str(tmp_path))
    assert chosen(words) == (str(tmp_path), str(tmp_path))
    assert chosen([*words, "--videos", "y"]) == ("y", str(tmp_path))
    assert chosen([*words, "--videos", "y", "--lists", "x"]) == ("y", "x")


@pytest.mark.parametrize(("variable", "option"), [("UCF101_PATH", "--videos"), ("UCF101_ANNPATH", "--lists")])
@pytest.mark.parametrize("given", ["nowhere", __file__])
def test_a_variable_that_names_no_folder_is_named(tmp_path, monkeypatch, capsys, variable, option, given):
    for name in VARIABLES.values():
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv(variable, given)
    assert command(video_classification, "train", "-f", 1) == 2
    said = f"error: {variable}={given} is not a folder: correct the variable, or give {option}\n"
    assert capsys.readouterr().err == said


def test_the_demo_names_its_data_whatever_the_environment_says(data, monkeypatch):
    called = []

    def note(words):
        called.append(words)
        MetricsLog(Path("run/metrics.jsonl")).append(test_accuracy_average=1.0)

    Path("run").mkdir()
    parsed = video_classification.parser().parse_args(["demo", "--data", str(data), "--run", "run"])
    monkeypatch.setattr(video_classification, "run", note)
    video_classification.demo(parsed)
    assert [words[0] for words in called] == ["train", "test"]
    for name in VARIABLES.values():
        monkeypatch.setenv(name, "nowhere")
    assert all(chosen(words) == (str(data / "videos"), str(data / "lists")) for words in called)


def test_language_model(capsys):
    """examples.nlp's `train FILE` and `sample --num-tokens N CHECKPOINT`."""
    Path("text.txt").write_text("to be or not to be\n" * 20)
    assert command(language_model, "train", "text.txt", *TINY_TEXT) == 0
    assert read_json(Path("runs/language_model/config.json"))["data"]["text"] == "text.txt"
    capsys.readouterr()
    checkpoint = "runs/language_model/best.safetensors"
    assert command(language_model, "sample", "--num-tokens", 12, checkpoint, "--prompt", "to") == 0
    written = capsys.readouterr().out
    assert len(written) == 2 + 12 + 1
    assert command(language_model, "sample", "--prompt", "to", "--num-tokens", 12) == 0
    assert capsys.readouterr().out == written
    with pytest.raises(SystemExit):
        command(language_model, "train", "text.txt", "--text", "text.txt")
    assert "not allowed with argument" in capsys.readouterr().err


def test_selective_copying_is_as_large_without_options():
    args = selective_copying.parser().parse_args([])
    assert (args.length, args.vocabulary, args.memorize) == (64, 6, 4)


def test_names_that_the_terminal_cannot_show(capsys):
    """stdout in ASCII, as in many containers: a name is printed with escapes, and is no error."""
    sys.stdout.reconfigure(encoding="ascii")
    assert exit_code(lambda: print("caf\u00e9 \udce9")) == 0
    assert capsys.readouterr().out == "caf\\xe9 \\udce9\n"
