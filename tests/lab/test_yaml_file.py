import pytest

from gradreg import cli
from gradreg.lab.folder import BadInput
from gradreg.lab.yaml_file import read_yaml


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data: digits\ndata: mnist1d\n", "the key 'data' stands twice"),
        ("base: {epochs: 1, epochs: 2}\n", "the key 'epochs' stands twice"),
        ("epochs: " + "[" * 5000 + "]" * 5000, "recursion"),
        ("epochs: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("epochs: [1\n", "must be YAML"),
    ],
)
def test_what_yaml_would_pass_over_is_refused_in_one_line(text, told, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match="--config must be") as caught:
        read_yaml("--config", path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mapping_is_read_as_it_stands(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: &x {k: 1}\nb: {<<: *x, l: [2, 3]}\n", encoding="utf-8")
    assert read_yaml("--config", path) == {"a": {"k": 1}, "b": {"k": 1, "l": [2, 3]}}


def test_a_run_that_saved_nothing_says_how_to_start_again(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--data", "digits", "--model", "mlp", "--epochs", "1", "--num-train", "100", "--out", str(folder)]
    assert cli.main(["train", *options]) == 0
    for path in (folder / "results.json", *(folder / "checkpoints").rglob("*")):
        if path.is_file():
            path.unlink()
    for path in (folder / "checkpoints").iterdir():
        path.rmdir()
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(folder)]) == 2
    assert "start it again in a new folder with: gradreg train --data digits" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["010", "-07", "1:30", "1:30.5", "20_000", "1_0.5", "yes", "No", "ON", "off"])
def test_what_readers_of_yaml_read_differently_is_refused(value, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"epochs: {value}\n")
    with pytest.raises(BadInput, match=r"YAML 1\.1") as refusal:
        read_yaml("--config", file)
    assert value in str(refusal.value)
    assert "line 1" in str(refusal.value)
    file.write_text(f"epochs: '{value}'\n")
    assert read_yaml("--config", file) == {"epochs": value}


def test_plain_numbers_and_words_are_read(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("a: 10\nb: 0\nc: 0.5\nd: -1\ne: true\nf: none\ng: 0x10\nh: nowhere\n")
    expected = {"a": 10, "b": 0, "c": 0.5, "d": -1, "e": True, "f": "none", "g": 16, "h": "nowhere"}
    assert read_yaml("--config", file) == expected
