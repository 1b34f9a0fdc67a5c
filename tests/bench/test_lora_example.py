"""The LoRA example: one start for all methods, what may move, whole runs, peft and the Trainer."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import content, same_bits
from helpers.paths import EXAMPLES
from torch import Tensor

from stiefel.optimizers import AdaPreLoRA, AltLoRA, SwitchLoRA, lora_param_groups

sys.path.insert(0, str(EXAMPLES))

import adapters
import common
import lora
import methods
import pretrain
import report

SHAPE = {"d": 32, "layers": 1, "heads": 2, "seq": 32, "batch": 4}
TINY = [f"--{key}={value}" for key, value in SHAPE.items()]
NAMES = [*lora.METHODS]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two small corpora over different words."""
    folder, made = tmp_path_factory.mktemp("corpus"), []
    for name, words in (("a", "step of a matrix is not the sum"), ("b", "for x in y: return z\n")):
        made.append(folder / f"{name}.txt")
        made[-1].write_text(" ".join(random.Random(0).choices(words.split(" "), k=9000)))
    return made[0], made[1]


def command(texts: tuple[Path, Path], out: Path, *more: object) -> list[str]:
    source, target = texts
    words = [*TINY, "--base-corpus", source, "--corpus", target, "--out", out, *more]
    return [str(word) for word in words]


def plan_of(texts: tuple[Path, Path], out: Path, *more: object) -> Any:
    """Settings of every run, and the corpus, as the command line has them."""
    args = lora.make_parser().parse_args(command(texts, out, *more))
    shape = pretrain.model_shape(args)
    corpus, source = (common.load_corpus(x, 32) for x in (args.corpus, args.base_corpus))
    return lora.make_plan(args, corpus, lora.base_settings(args, source, shape), shape), corpus


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    """Weights to adapt; that they are not trained is nothing to these tests."""
    return dict(common.build_model(32, 1, 2, 32, seed=5).state_dict())


# ----------------------------------------------------------------------------------- protocol


def test_every_method_starts_from_the_base_with_the_same_adapters_and_batches(
    texts: tuple[Path, Path], tmp_path: Path, base: dict[str, Tensor]
) -> None:
    plan, corpus = plan_of(texts, tmp_path)
    runs = {s.method: lora.LoRARun(s, corpus, base) for s in plan}
    model = common.build_model(32, 1, 2, 32, seed=0)
    model.load_state_dict(base)
    batch = corpus.val[:99].view(3, 33).long()
    expected = model(batch[:, :-1])
    first = runs.pop("switchlora")
    for run in (first, *runs.values()):
        torch.testing.assert_close(run.model(batch[:, :-1]), expected, rtol=0, atol=2e-6)
        assert torch.equal(run.generator.get_state(), first.generator.get_state())
    start = runs["adamw"].model.state_dict()
    assert all(same_bits(dict(run.model.state_dict()), dict(start)) for run in runs.values())
    factors = [p for name, p in first.model.named_parameters() if p.requires_grad]
    assert len(factors) == 14 and all(p.detach().abs().max() > 0 for p in factors)
    other, _ = plan_of(texts, tmp_path, "--seed", 1)
    moved = lora.LoRARun(other[0], corpus, base).model.state_dict()
    assert not torch.equal(moved["blocks.0.q.lora_A"], start["blocks.0.q.lora_A"])


@pytest.mark.parametrize("name", NAMES)
def test_adapters_move_and_what_is_frozen_stays(
    name: str, texts: tuple[Path, Path], tmp_path: Path, base: dict[str, Tensor]
) -> None:
    (settings,), corpus = plan_of(texts, tmp_path, "--optimizer", name, "--steps", 12)
    run = lora.LoRARun(settings, corpus, base)
    start = {key: value.clone() for key, value in run.model.state_dict().items()}
    for _ in range(12):
        run.train_step()
    changed = {
        key for key, value in run.model.state_dict().items() if not torch.equal(value, start[key])
    }
    hidden = {f"blocks.0.{x}" for x in adapters.HIDDEN}
    expected = {f"{x}.{key}" for x in hidden for key in ("lora_A", "lora_B")}
    if name == "switchlora":
        expected |= {f"{x}.weight" for x in hidden}  # what is switched goes there
    assert changed == expected
    assert run.record.lr[:2] == pytest.approx([settings.lr, settings.lr])  # warm-up of one step
    assert run.record.lr[-1] < 0.03 * settings.lr  # down to 0, not to a tenth
    assert len(run.optimizer.param_groups) == 1


def test_plan_has_scale_total_steps_and_base(texts: tuple[Path, Path], tmp_path: Path) -> None:
    more = ("--steps", 30, "--rank", 4, "--alpha", 8, "--set", "altlora.schedule=alternate")
    plan, _ = plan_of(texts, tmp_path, *more)
    by_name = {s.method: s for s in plan}
    assert list(by_name) == NAMES and {s.lr for s in plan} == {m.lr for m in lora.METHODS.values()}
    assert by_name["switchlora"].options["total_steps"] == 30
    assert by_name["altlora"].options["schedule"] == "alternate"
    assert "schedule" not in by_name["altlora+"].options
    assert {s.options["betas"] for s in plan} == {methods.BETAS}
    model = adapters.plain_model(common.build_model(32, 1, 2, 32, seed=0), 4, 8)
    assert {group["scale"] for group in lora_param_groups(model)} == {2.0}
    other, _ = plan_of(texts, tmp_path, *more, "--base-steps", 3)
    assert len({s.base for s in plan}) == 1 and other[0].base != plan[0].base


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "muon"], "Unknown optimizer 'muon': choose from adamw, altlora"),
        (["--optimizer", "altlora", "--set", "rnak=8"], "none of altlora takes 'rnak'"),
        (["--optimizer", "altlora", "--set", "delta=-1"], "delta must be at least 0"),
        (["--optimizer", "altlora", "--lr", "x"], "'x' is not a number"),
        (["--optimizer", "adamw", "--hf"], "pip install '.[hf]'"),
    ],
)
def test_mistakes_are_said_before_the_base_is_trained(
    arguments: list[str],
    message: str,
    texts: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # not installed, as far as import can tell
    assert lora.main(command(texts, tmp_path, *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("lora.py: ") and error.count("\n") == 1
    assert not list(tmp_path.glob("*.pt"))


# ---------------------------------------------------------------------------------- whole runs


def test_quick_comparison_from_the_command_line(texts: tuple[Path, Path], tmp_path: Path) -> None:
    script = str(EXAMPLES / "lora.py")
    words = [sys.executable, script, *command(texts, Path("here"), "--quick")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for word in ("base model: 60 steps", "before: ", "in adapters", "40/40", "bits", *NAMES):
        assert word in done.stdout
    results = json.loads((tmp_path / "here/results.json").read_text())
    # the form of pretrain.py, with a few more settings
    assert results.keys() == {"environment", "protocol", "corpus", "model", "runs", "summary"}
    assert results["model"].keys() == {"parameters", "matrix_parameters"}
    fields = {*common.Settings.__dataclass_fields__, "rank", "alpha", "hf", "base"}
    assert all(run["settings"].keys() == fields for run in results["runs"])
    assert [run["settings"]["method"] for run in results["runs"]] == NAMES
    assert len(results["summary"]) == len(NAMES)
    assert all(row.keys() == {*report.Row.__dataclass_fields__} for row in results["summary"])
    before = results["protocol"]["base_val_loss"]
    for run in results["runs"]:
        assert [step for step, _ in run["record"]["val"]] == [25, 40]
        assert run["val_loss"] < before - 0.2, run["settings"]["method"]
    picture = tmp_path / "here/loss.png"
    assert picture.exists() == (importlib.util.find_spec("matplotlib") is not None)
    assert len([*(tmp_path / "here").glob("base-*.pt")]) == 1


def test_base_is_trained_once_and_results_are_paired(
    texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--base-steps", 4, "--steps", 4, "--compare", "adamw,adaprelora", "--no-progress")
    words = command(texts, tmp_path, *more)
    assert lora.main([*words, "--seeds", "2"]) == 0
    first = capsys.readouterr().out
    assert "4 steps on a.txt, once" in first and "by seed" in first
    assert lora.main([*words, "--json", "-"]) == 0
    again = capsys.readouterr()
    assert "base model: from" in again.err and "base model: 4 steps" not in again.err
    runs = json.loads(again.out)["runs"]
    before = torch.load(tmp_path / "adaprelora-seed1.pt", weights_only=True)["record"]["train"]
    assert runs[1]["settings"]["seed"] == 0 and runs[1]["record"]["train"] != before


@pytest.mark.parametrize("name", [*NAMES, "base"])
def test_interrupted_runs_end_bit_identical(
    name: str, texts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in the middle, between two checkpoints, and continued: the run that was never ended."""
    method = "adamw" if name == "base" else name
    more = ["--optimizer", method, "--base-steps", 6, "--steps", 24, "--val-every", 10]
    more += ["--checkpoint-every", 4 if name == "base" else 7, "--no-progress"]
    assert lora.main(command(texts, tmp_path / "whole", *more)) == 0
    words = command(texts, tmp_path / "ended", *more)
    kind, last = (common.Run, 5) if name == "base" else (lora.LoRARun, 17)
    step = common.Run.train_step

    def stops(run: common.Run) -> None:
        if type(run) is kind and run.record.step == last:
            raise KeyboardInterrupt
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "train_step", stops)
        assert lora.main(words) == 130
    path = f"{method}-seed0.pt"
    if name != "base":
        assert content(tmp_path / "ended" / path)["record"]["step"] == 14
    assert lora.main([*words, "--resume"]) == 0
    files = sorted(p.name for p in (tmp_path / "whole").glob("*.pt"))
    assert len(files) == 2 and path in files
    for file in files:
        assert same_bits(content(tmp_path / "whole" / file), content(tmp_path / "ended" / file))
    refused = [*words, "--resume", "--lr", "0.5"]
    assert lora.main(refused) == 2


# ------------------------------------------------------------------- peft and transformers


@pytest.fixture
def hub() -> None:
    for name in ("peft", "transformers", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[hf]'")


def peft_model(base: dict[str, Tensor], switch: bool = False) -> Any:
    model = common.build_model(32, 1, 2, 32, seed=0)
    model.load_state_dict(base)
    made = adapters.peft_model(model, 4, 8)
    adapters.start_adapters(made, 0, switch=switch)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_peft_model_does_what_the_plain_one_does(
    name: str, hub: None, texts: tuple[Path, Path], tmp_path: Path, base: dict[str, Tensor]
) -> None:
    losses = []
    for more in ([], ["--hf"]):
        (settings,), corpus = plan_of(texts, tmp_path, "--optimizer", name, "--steps", 15, *more)
        run = lora.LoRARun(settings, corpus, base)
        for _ in range(15):
            run.train_step()
        losses.append(run.record.train)
    assert losses[1][-1] < losses[1][0] - 0.01
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("cls", [AltLoRA, AdaPreLoRA, SwitchLoRA])
def test_trainer_takes_the_optimizer_both_ways(
    cls: Any, hub: None, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    """A class with its keywords and an object end alike; a resumed run ends as the whole one."""
    from transformers import Trainer, TrainingArguments

    switch = cls is SwitchLoRA
    options = {"lr": 1e-2, **({"total_steps": 4, "interval0": 10} if switch else {})}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(97, 123, (32, 16), generator=generator)
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trainer(way: str, out: str) -> Any:
        model = peft_model(base, switch).model
        groups = lora_param_groups(model, base_weight=switch)
        how: dict[str, Any] = {"optimizers": (cls(groups, **options), None)}
        if way == "class":
            how = {"optimizer_cls_and_kwargs": (cls, {"params": groups, **options})}
        args = TrainingArguments(
            output_dir=str(tmp_path / out), max_steps=4, per_device_train_batch_size=4,
            gradient_accumulation_steps=2, max_grad_norm=1.0, save_steps=2, logging_steps=1,
            report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        return Trainer(model=model, args=args, train_dataset=data, **how)

    def ended(made: Any) -> list[Tensor]:
        factors = {k: p.detach() for k, p in made.model.named_parameters() if "lora_" in k}
        assert all(p.isfinite().all() for p in factors.values())
        return [*factors.values()]

    start = ended(trainer("class", "start"))
    whole = trainer("object", "a")
    whole.train()
    other = trainer("class", "b")
    other.train()
    assert same_bits(ended(whole), ended(other)) and not same_bits(ended(whole), start)
    steps = whole.optimizer.state_dict()["state"][0]["step"]
    assert int(steps) == 4
    if switch:
        return  # the Trainer saves adapters only, and SwitchLoRA writes base weights too
    resumed = trainer("class", "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert same_bits(ended(resumed), ended(whole))
