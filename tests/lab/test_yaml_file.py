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
