"""The defects that public trainers of autoencoders have: each is planted in a copy of this project and must be caught.

    DEFECTS -> copy of codec/, eval/, train/, tests/ -> one small edit -> pytest on the named tests -> they turn red

The table of defects in README.md has a row for each. Whoever changes a line that an edit quotes changes the edit too:
a fast test says which.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("codec", "eval", "train", "tests")


@dataclass(frozen=True)
class Edit:
    """One replacement in a file; `old` stands there exactly once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Plant:
    """One way to have a defect.

    Attributes:
        name: tells the plants of one defect apart; "" where there is one.
        edits: what plants it.
        tests: ids of those of our tests that must turn red.
        shows: a regular expression found in each one's failure: it fails for this reason and no other.
    """

    name: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    shows: str


@dataclass(frozen=True)
class Defect:
    """A class of defects.

    Attributes:
        number: as numbered in the README.
        words: what it is.
        who: public trainers that have it, as read in their code.
        plants: at least one.
    """

    number: str
    words: str
    who: str
    plants: tuple[Plant, ...]


TASK, ADVERSARY, TRAINER = "train/autoencoder.py", "train/adversary.py", "train/trainer.py"
LATENT_TERMS = "train/latent_terms.py"
LOSSES = "train/losses.py"
TRAINED = "trained = [p for p in self.module.parameters() if p.requires_grad]"
GAME = "tests/train/test_adversarial.py::"
RANKS = "tests/train/test_ranks.py::test_two_ranks_stay_equal_to_the_bit_in_all_phases"
DRIFTED = "the ranks have drifted apart"
LEAK = f"{GAME}test_neither_step_leaves_a_gradient_in_the_others_network"
PHASES = f"{GAME}test_the_phases_come_when_the_recipe_says_and_the_discriminator_is_warm_before_it_counts"
BOTH = f"{GAME}test_both_networks_train_on_every_batch_and_a_step_counts_once"
REACHES = f"{GAME}test_each_loss_reaches_the_parameters_that_it_should_and_no_others"
MOVES = f"{GAME}test_the_perceptual_term_alone_moves_the_reconstruction_towards_the_image"
EVERY = f"{GAME}test_steps_move_every_parameter_of_both_networks"
BF16 = "tests/train/test_trainer.py::test_bf16_computes_in_bf16_and_keeps_float32_weights_and_averages"
CODEBOOKS = "tests/train/test_vq.py::test_ranks_stay_equal_to_the_bit_through_kmeans_means_and_revival"
FEATURES = "tests/eval/test_features.py::"
BETA = "tests/train/test_losses.py::test_beta_weighs_the_commitment_of_the_latents_and_not_the_codebook"

# fmt: off
DEFECTS = (
    Defect(
        "W1", "DDP bypassed: the unwrapped module is called, gradients stay on their rank, the ranks drift apart",
        "diffusers' train_autoencoderkl and cloneofsimo's vqgan-training (autoencoder), RAE (discriminator)",
        (
            Plant("autoencoder", (
                Edit(TASK, "outputs: Outputs = module(x, draws)", "outputs: Outputs = self.module(x, draws)"),
            ), (RANKS,), f"{DRIFTED} at step 2:"),  # in the first one the learning rate is still 0
            Plant("discriminator", (
                Edit(ADVERSARY, "logits = critic(torch.cat(", "logits = self.discriminator(torch.cat("),
            ), (RANKS,), f"{DRIFTED} at step 5:"),  # the first in which it trains
        ),
    ),
    Defect(
        "W2", "gradients leak between the two steps: reconstructions not detached, the other's gradients kept",
        "diffusers' train_autoencoderkl",
        (
            Plant("autoencoder", (
                Edit(TASK, "in (target, outputs.x_hat.detach()))", "in (target, outputs.x_hat))"),
            ), (f"{LEAK}[rounded=false]",), r"AssertionError: network\.encoder\."),
            Plant("discriminator", (
                Edit(ADVERSARY, "with frozen(self.discriminator), step.autocast():", "with step.autocast():"),
                Edit(TASK, "(gradient,) = torch.autograd.grad(term, leaf)", "term.backward(); gradient = leaf.grad"),
            ), (f"{LEAK}[rounded=true]", f"{LEAK}[rounded=false]"),
                r"assert all\(p\.grad is None for p in task\.critic\.parameters\(\)\)"),
        ),
    ),
    Defect(
        "W3", "the perceptual loss has no gradient: computed under no_grad, it is only logged",
        "diffusers' train_autoencoderkl",
        (
            Plant("no_grad", (
                Edit(LOSSES, '            terms["perceptual"] =',
                     '            with torch.no_grad():\n                terms["perceptual"] ='),
            ), (f"{REACHES}[perceptual]",), "does not require grad"),
            Plant("detached", (
                Edit(LOSSES, "self.perceptual(x, x_hat).mean()",
                     "(self.perceptual(x, x_hat.detach()).mean() + 0 * x_hat.sum())"),
            ), (f"{REACHES}[perceptual]", MOVES), r"assert largest > 1e-7|assert values\[-1\] < 0\.9 \* values\[0\]"),
        ),
    ),
    Defect(
        "W4", "trained weights, and their averages, cast to bf16: small steps round to no change",
        "diffusers' train_autoencoderkl",
        (
            Plant("", (
                Edit(TRAINER, "task.module.to(self.device)",
                     'task.module.to(self.device, torch.bfloat16 if config.run.precision == "bf16" else None)'),
            ), (BF16,), r"assert \{torch\.bfloat16\} == \{torch\.float32\}"),
        ),
    ),
    Defect(
        "W5", "LPIPS in train mode: its dropout makes the loss noisy",
        "taming-transformers, latent-diffusion, generative-models, VA-VAE, EQ-VAE, LlamaGen, "
        "cloneofsimo's vqgan-training",
        (
            Plant("", (
                Edit("eval/features.py", "return super().train(False)", "return super().train(mode)"),
            ), (f"{FEATURES}test_stays_frozen_in_a_trainer", f"{FEATURES}test_lpips_uses_the_file[alex-alexnet]"),
                r"assert not any\(module\.training|assert torch\.equal\(distance, metric\(x, x_hat\)\)"),
        ),
    ),
    Defect(
        "W6", "the discriminator is untrained when it starts to count",
        "taming-transformers, latent-diffusion, generative-models, lavinal712's AutoencoderKL, "
        "diffusers' train_autoencoderkl, VA-VAE, LlamaGen, TiTok",
        (
            Plant("", (
                Edit(TASK, 'if self.adversary is None or self.adversary.phase(step) == "reconstruction":',
                     "if self.adversary is None or not self.adversary.plays(step):"),
            ), (PHASES,), r"assert trained == \(images >= 16\)"),
        ),
    ),
    Defect(
        "W7", "wasted work before the start: the discriminator's forward pass and gradients, times zero",
        "taming-transformers, latent-diffusion, diffusers' train_autoencoderkl, VA-VAE",
        (
            Plant("", (
                Edit(TASK, "if self.adversary is not None and self.adversary.plays(step):",
                     "if self.adversary is not None:"),
            ), (PHASES,), r"assert min\(calls\) == 16"),
        ),
    ),
    Defect(
        "W8", "the adaptive weight is each rank's own: the averaged gradient is that of no loss",
        "all that have one: taming-transformers, latent-diffusion, generative-models, lavinal712's AutoencoderKL, "
        "diffusers' train_autoencoderkl and train_vqgan, VA-VAE, EQ-VAE, mosaicml's diffusion, RAE",
        (
            Plant("", (
                Edit(ADVERSARY, "= reduce(torch.cat(sums)).chunk(2)", "= torch.cat(sums).chunk(2)"),
            ), (RANKS,), f"{DRIFTED} at step 9:"),  # the first with an adversarial term
        ),
    ),
    Defect(
        "W9", "VQ: beta on the wrong term, so that commitment weighs 1 and the codebook 0.25",
        "taming-transformers, latent-diffusion, diffusers' VQModel",
        (
            Plant("", (
                Edit(LOSSES, "F.mse_loss(z_q, z.detach()) + beta * F.mse_loss(z, z_q.detach())",
                     "beta * F.mse_loss(z_q, z.detach()) + F.mse_loss(z, z_q.detach())"),
            ), (BETA,), "assert False"),
        ),
    ),
    Defect(
        "W10", "statistics of a batch (codebook, LeCAM's anchors) are each rank's own",
        "taming-transformers and generative-models (codebook averages), LlamaGen (codebook usage), "
        "TiTok and SEED-Voken's IBQ (LeCAM)",
        (
            Plant("LeCAM", (
                Edit(ADVERSARY, "real, fake = logits.chunk(2)\n",
                     "real, fake = logits.chunk(2)\n        self._own = float(real.mean()), float(fake.mean())\n"),
                Edit(ADVERSARY, '(1 - decay) * values["d_real"]', "(1 - decay) * self._own[0]"),
                Edit(ADVERSARY, '(1 - decay) * values["d_fake"]', "(1 - decay) * self._own[1]"),
            ), (RANKS,), f"{DRIFTED} at step 5:"),
            Plant("moments", (
                Edit("train/latent_terms.py", 'values["latent_moments"] =', 'values["latent_moments"] = self.own ='),
                Edit(TASK, 'self._scale.update(*values["latent_moments"])',
                     "self._scale.update(*self._latents.own.tolist())"),
            ), (RANKS,), f"{DRIFTED} at step 1:"),
            Plant("codebook", (
                Edit("train/vq/tokens.py", "total = reduce(total)", "total = total.clone()"),
            ), (f"{CODEBOOKS}[ema]",), r"AssertionError: \('weight', 1\)"),
            Plant("k-means", (
                Edit("train/vq/kmeans.py", "total = reduce(total)", "total = total.clone()"),
            ), (f"{CODEBOOKS}[ema]",), r"AssertionError: \('weight', 0\)"),
        ),
    ),
    Defect(
        "W11", "parameters that no optimizer holds: the log-variance of the losses, the quant convolutions",
        "latent-diffusion, VA-VAE, EQ-VAE (log-variance), generative-models (quant convolutions)",
        (
            Plant("scale", (
                Edit(TASK, TRAINED, f"{TRAINED[:-1]} and p.ndim > 0]"),
            ), (f"{GAME}test_the_learned_scale_is_learned", EVERY),
                r"assert \['module\.log_scale'\] == \[\]|assert 0\.0 == -0\.\d+ ± "),
            Plant("quant", (
                Edit(TASK, TRAINED, 'trained = [p for n, p in self.module.named_parameters() if "quant" not in n]'),
            ), (EVERY,), r"first extra item: 'module\.network\.quant_conv\.weight'"),
        ),
    ),
    Defect(
        "W12", "autoencoder and discriminator on alternate batches: each image trains only one of them",
        "diffusers' train_autoencoderkl and train_vqgan, generative-models, lavinal712's AutoencoderKL",
        (
            Plant("", (
                Edit(TRAINER, "for side in sides.values():\n",
                     "for side in [*sides.values()][self.progress.step % len(sides) :][:1]:\n"),
            ), (BOTH,), r"assert not any\(torch\.equal\(a, b\)"),
        ),
    ),
    Defect(
        "W13", "a step with two optimizers counts twice: every moment comes too early",
        "VA-VAE",
        (
            Plant("steps", (
                Edit(TRAINER, "self.progress.step += 1", "self.progress.step += len(sides)"),
            ), (BOTH,), r"assert \(trainer\.progress\.step, trainer\.progress\.images\)"),
            Plant("images", (
                Edit(TRAINER, "images += self._images_per_step", "images += self._images_per_step * len(sides)"),
            ), (BOTH, PHASES), r"assert \(trainer\.progress\.step, trainer\.progress\.images\)|assert phases =="),
        ),
    ),
)
# fmt: on
PLANTED = [
    pytest.param(plant, id=f"{defect.number}-{plant.name}".strip("-")) for defect in DEFECTS for plant in defect.plants
]


def copy_of_the_project(folder: Path) -> Path:
    """Copy what the tests need; pytest stops there at once if it would test anything but the copy."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "conftest.py").write_text(
        "import importlib\nfrom pathlib import Path\n"
        f"for name in {PACKAGES}:\n"
        "    path = Path(importlib.import_module(name).__file__)\n"
        "    assert path.is_relative_to(Path(__file__).parent), path\n"
    )
    return folder


def in_copy(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the copy in front of the installed project, in all processes that it starts."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900, check=False)


def outcomes(copy: Path, tests: list[str]) -> tuple[int, dict[str, tuple[str, str]]]:
    """Return pytest's exit code, and of each test whether it "passed" or not, with what it says."""
    report = copy / "report.xml"
    done = in_copy(
        copy, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", str(copy / "t"), "--junitxml", str(report), *tests
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 2: not collected; 4: no such test
    found: dict[str, tuple[str, str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        trouble = [child for child in case if child.tag in ("failure", "error", "skipped")]
        said = " ".join(f"{child.get('message', '')} {child.text or ''}" for child in trouble)
        test = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        found[test] = (trouble[0].tag if trouble else "passed", " ".join(said.split()))
    return done.returncode, found


@pytest.mark.parametrize("plant", PLANTED)
def test_the_edits_fit_the_code_and_the_tests_are_there(plant: Plant) -> None:
    for edit in plant.edits:
        assert (ROOT / edit.file).read_text(encoding="utf-8").count(edit.old) == 1, f"{edit.file}: {edit.old}"
    for test in plant.tests:
        file, name = test.split("::")
        assert f"def {name.split('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), test


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.number)
def test_the_readme_has_a_row_with_the_tests(defect: Defect) -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith(f"| {defect.number} ")]
    assert len(rows) == 1, f"{len(rows)} rows of README.md start with | {defect.number}"
    words, who, tests = (cell.strip() for cell in rows[0].strip("|").split("|"))
    assert words
    assert who
    names = {test.split("::")[1].split("[")[0] for plant in defect.plants for test in plant.tests}
    assert {name for name in names if f"`{name}`" not in tests} == set()
    assert names


@pytest.mark.slow
def test_a_copy_imports_itself_in_ranks_too(tmp_path: Path) -> None:
    copy = copy_of_the_project(tmp_path / "copy")
    names = ", ".join(PACKAGES)
    said = f"os.write(1, ''.join(m.__file__ + '\\n' for m in ({names})).encode())\n"  # at once: ranks share the pipe
    (copy / "places.py").write_text(f"import os, {names}\n{said}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for arguments, n in (([], 1), (launcher, 2)):
        done = in_copy(copy, *arguments, "-m", "places")
        expected = [str(copy / name / "__init__.py") for name in PACKAGES]
        assert sorted(done.stdout.split()) == sorted(n * expected), done.stderr


@pytest.mark.slow
def test_without_a_defect_all_of_them_pass(tmp_path: Path) -> None:
    tests = sorted({test for defect in DEFECTS for plant in defect.plants for test in plant.tests})
    code, found = outcomes(copy_of_the_project(tmp_path / "copy"), tests)
    assert {test: outcome for test, outcome in found.items() if outcome[0] != "passed"} == {}
    assert (code, sorted(found)) == (0, tests)


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_defect_turns_the_named_tests_red(plant: Plant, tmp_path: Path) -> None:
    copy = copy_of_the_project(tmp_path / "copy")
    for edit in plant.edits:
        text = (copy / edit.file).read_text(encoding="utf-8")
        assert text.count(edit.old) == 1, f"{edit.file}: {edit.old}"
        (copy / edit.file).write_text(text.replace(edit.old, edit.new), encoding="utf-8")
    code, found = outcomes(copy, list(plant.tests))
    assert sorted(found) == sorted(plant.tests)
    for test, (outcome, said) in found.items():
        assert outcome in ("failure", "error"), f"{test}: {outcome}"  # an error is a failure in its fixture
        assert re.search(plant.shows, said), f"{test}: {said}"
    assert code == 1
