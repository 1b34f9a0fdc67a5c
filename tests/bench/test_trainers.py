"""The recipes of examples/trainers: every script is run, and its checks can fail.

``make trainers`` runs the scripts themselves, in an environment with their packages.
"""

import importlib.util
import subprocess
import sys

import pytest
import torch
from helpers.paths import EXAMPLES, TESTS
from torch import nn

from stiefel.optimizers import Muon

FOLDER = EXAMPLES / "trainers"


def module(name):
    spec = importlib.util.spec_from_file_location(f"trainers_{name}", FOLDER / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def tiny():
    return module("tiny")


def test_every_recipe_is_run_and_says_how():
    run = module("run")
    scripts = {path.stem for path in FOLDER.glob("*.py")} - {"tiny", "run"}
    assert {name.split(",")[0] for name in run.RECIPES} == scripts
    for name, processes in run.RECIPES.items():
        name = name.split(",")[0]
        text = (FOLDER / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 110, name
        command = "torchrun --nproc-per-node 2" if processes > 1 else "python"
        assert f"{command} examples/trainers/{name}.py" in text.split('"""')[1]
        assert "tiny.show(" in text and "tiny.verdict(" in text


def test_the_runner_tells_failures_from_missing_packages(monkeypatch, capsys):
    run = module("run")
    codes = dict(zip(run.RECIPES, [0, run.MISSING, 1], strict=False))
    monkeypatch.setattr(run, "run", lambda name: (codes.get(name, 0), 1.0, "needs x\nloss: after"))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert run.main() == 1
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert words[:4] == ["ok", "skipped", "FAILED", "ok"]
    codes.clear()
    assert run.main() == 0
    monkeypatch.setattr(sys, "argv", ["run.py", "no_such"])
    with pytest.raises(SystemExit, match="2"):
        run.main()


def test_checks_of_a_recipe_fail_where_they_should(tiny, capsys):
    model, same, other = tiny.Llama(), tiny.Llama(), tiny.Llama(seed=1)
    tiny.verdict(2.0, 1.0, model, same)
    assert "before 2.0000, after 1.0000" in capsys.readouterr().out
    for before, after, resumed, text in (
        (1.0, 1.0, same, "did not fall"),
        (1.0, float("nan"), same, "did not fall"),
        (2.0, 1.0, other, "differs in"),
        (2.0, 1.0, {}, "differs in"),
    ):
        with pytest.raises(SystemExit, match=text):
            tiny.verdict(before, after, model, resumed)


def test_an_embedding_on_a_matrix_rule_is_found(tiny, capsys):
    tiny.show(Muon(tiny.Llama()))
    named = [{"params": list(tiny.Llama().named_parameters())[:1], "rule": "Muon"}]
    with pytest.raises(SystemExit, match=r"embed_tokens\.weight"):
        tiny.show(Muon(named))
    with pytest.raises(SystemExit, match="256"):
        tiny.show(Muon([nn.Parameter(torch.zeros(256, 4))]))


def test_a_missing_package_ends_with_its_own_code(tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        tiny.needs("argparse", "no_package_of_this_name")
    assert ended.value.code == tiny.MISSING == module("run").MISSING
    assert "needs no_package_of_this_name" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm: make trainers")
def test_timm_recipe_trains_with_a_stand_in_for_torchvision():
    command = [sys.executable, str(TESTS / "helpers" / "without_torchvision.py")]
    recipe = str(FOLDER / "timm_layer_decay.py")
    done = subprocess.run([*command, recipe], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kept group keys: lr_scale" in done.stdout and "the same bits" in done.stdout
