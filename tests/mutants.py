"""Break the program in one line at a time, and see that a test fails: python tests/mutants.py, or make mutants.

Each mutation is made in a temporary copy of the tree and taken back there. Exit status 1 where one survives, or where
its old text is not found exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
W = "tests/test_wiring.py"
WAITS = "tests/test_fake_cuda.py::test_a_step_waits_for_nothing"


@dataclass(frozen=True)
class Mutant:
    """Text `old`, which is in `file` once, becomes `new`; one of `tests` must fail then."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant("models/guides.py", "views * t[:1].long()", "views * int(t[0])", WAITS),
    Mutant("datasets/augment.py", "torch.stack([images.new_full((), each) for each in _LUMA])",
           "images.new_tensor(_LUMA)", WAITS),
    Mutant("guided_diffusion/train_util.py", "generator=rng).to(self.device, non_blocking=True)",
           "generator=rng).to(self.device)", WAITS),
    Mutant("guided_diffusion/synthesis.py", "*step).to(device, non_blocking=True)", "*step).to(device)", WAITS),
    Mutant("guided_diffusion/synthesis.py", "by_model[m][index].to(device)", "by_model[m].to(device)[index]",
           "tests/test_fake_cuda.py::test_training_gives_what_it_gives_on_a_cpu"),
    Mutant("models/clusters.py", "log_shares - log_shares.logsumexp(0, keepdim=True)", "log_shares",
           "tests/test_clusters.py::test_the_first_rounds_keep_the_shares_equal"),
    Mutant("models/clusters.py", " + shares.log()", "",
           "tests/test_clusters.py::test_the_shares_decide_where_two_clusters_meet"),
    Mutant("guided_diffusion/synthesis.py", "(guess == asked)", "(guess == guess)", f"{W}::test_hits"),
    Mutant("guided_diffusion/synthesis.py", "(guess == asked)", "(guess == asked - plan.first_class(m))",
           f"{W}::test_hits"),
    Mutant("main.py", "data = self.pseudo_dataset(phase)",
           "self.learners = self.new_learners() if phase.fresh else self.learners; data = self.pseudo_dataset(phase)",
           f"{W}::test_a_round_is_drawn_by_what_was_learnt"),
    Mutant("main.py", "if number in phase.relabel:", "if False:",
           f"{W}::test_labels_are_read_anew_by_the_network_before"),
    Mutant("main.py", 'if phase.labels == "clusters":', "if False:",
           f"{W}::test_labels_are_read_anew_by_the_network_before"),
    Mutant("main.py", "guide(), asked)", "guide(), None)",
           f"{W}::test_guided_images_are_asked_for_what_their_noise_shows"),
    Mutant("models/learners.py", '"episodes", epoch', '"episodes", 0', f"{W}::test_each_epoch_has_its_own_draws"),
    Mutant("main.py", '"epoch", phase.epoch', '"epoch", 0', f"{W}::test_each_epoch_has_its_own_draws"),
    Mutant("models/learners.py", "flip=self.s.flip", "flip=True", f"{W}::test_flip_of_meta_training"),
    Mutant("schedule.py", "epoch == start and", "False and", "tests/test_schedule.py"),
    Mutant("schedule.py", "range(done * s.epoch_steps, (done + 1) * s.epoch_steps)", "range(s.epoch_steps)",
           "tests/test_schedule.py"),
    Mutant("models/meta_model.py", "class_prototypes(support_maps.mean((-2, -1)).unflatten(0, shots)",
           "class_prototypes(F.normalize(support_maps.mean((-2, -1)).unflatten(0, shots), dim=-1)",
           f"{W}::test_training_prototypes_are_means_before_normalisation"),
    Mutant("models/learners.py", "model.look(to_float(part", "model.embed(to_float(part",
           f"{W}::test_validation_is_on_features_before_normalisation"),
    Mutant("few_shot.py", "RATES = (0.05, 0.01, 0.05)", "RATES = (0.05, 0.05, 0.05)", f"{W}::test_rates_of_heads"),
    Mutant("few_shot.py", "MIX_BETA = 0.4", "MIX_BETA = 1.0", f"{W}::test_partners_and_shares"),
    Mutant("few_shot.py", '(self.s.seed, "mix", m, i)', '(self.s.seed, "mix", i)', f"{W}::test_partners_and_shares"),
    Mutant("few_shot.py", '(self.s.seed, "mix", m, i)', '(0, "mix", m, i)', f"{W}::test_partners_and_shares"),
    Mutant("guided_diffusion/guidance.py", "GREATEST_FACTOR = 1.0", "GREATEST_FACTOR = 10.0",
           f"{W}::test_strength_of_guidance_on_x_0"),
    Mutant("guided_diffusion/guidance.py", "((1 - abar) / abar).clamp", "((1 - abar) / abar.sqrt()).clamp",
           f"{W}::test_strength_of_guidance_on_x_0"),
    Mutant("guided_diffusion/resample.py", "weights = 1.0 / (self.num_timesteps * p[t])",
           "weights = torch.ones_like(p[t])", "tests/test_resample.py"),
    Mutant("guided_diffusion/train_util.py", "loss * weights[part]", "loss",
           f"{W}::test_losses_are_weighted_and_told_unweighted"),
    Mutant("guided_diffusion/train_util.py", "update_with_local_losses(t, every)",
           "update_with_local_losses(t, every * weights)", f"{W}::test_losses_are_weighted_and_told_unweighted"),
    Mutant("guided_diffusion/train_util.py", "self.sampler.update_with_local_losses(t, every)", "pass",
           f"{W}::test_losses_are_weighted_and_told_unweighted"),
    Mutant("guided_diffusion/train_util.py", "if s.grad_clip > 0", "if False", f"{W}::test_gradients_are_clipped"),
    Mutant("guided_diffusion/train_util.py", "flip=s.random_flip", "flip=True", f"{W}::test_flip_of_pretraining"),
    Mutant("guided_diffusion/image_train.py", "replace(s, seed=s.seed + m)", "replace(s, seed=s.seed)",
           f"{W}::test_each_model_of_a_pool_has_its_seed"),
    Mutant("models/learners.py", "rate * s.learner_rate for", "rate for", f"{W}::test_rate_of_the_class_learner"),
    Mutant("models/learners.py", "generator=rng, device=rng.device)).long()",
           "generator=rng, device=rng.device) ** 3).long()", f"{W}::test_how_the_class_learner_learns"),
    Mutant("models/learners.py", "for rate in rates], loss_of", "for rate in rates[1:]], loss_of",
           f"{W}::test_how_the_class_learner_learns"),
    Mutant("models/learners.py", "s.train_batch * (s.way * s.shot + s.train_nTestNovel)",
           "s.train_batch * s.train_nTestNovel", f"{W}::test_how_the_class_learner_learns"),
    Mutant("models/learners.py", "(self.s.image_batch,)", "(96,)", f"{W}::test_how_the_clusters_recipe_learns"),
    Mutant("main.py", "renoise=s.renoise", "renoise=0.0", f"{W}::test_how_images_are_drawn"),
    Mutant("main.py", "guides.calibrate(self.learners.model, self.learners.learner,", "str(",
           f"{W}::test_a_new_class_learner_is_calibrated"),
]  # fmt: skip


def stale() -> list[str]:
    """Mutants whose old text is not there exactly once, in a line each."""
    counts = [(m, (ROOT / m.file).read_text(encoding="utf-8").count(m.old)) for m in MUTANTS]
    return [f"{m.file}: got {count} times {m.old!r}, expected once" for m, count in counts if count != 1]


def passes(tree: Path, tests: list[str]) -> bool:
    """Whether tests pass in `tree`. Raises ValueError if they cannot be run."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    alone = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # a mutant may be as old and long as the original
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=os.environ | alone)
    if done.returncode not in (0, 1):
        raise ValueError(f"{' '.join(tests)}: cannot be run\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> int:
    """Try the mutants of the files whose names have a word of the command line in them, or all."""
    if lines := stale():
        print(*lines, sep="\n")
        return 1
    chosen = [m for m in MUTANTS if not sys.argv[1:] or any(word in m.file for word in sys.argv[1:])]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        leave = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "pools", "cache", ".*_cache")
        shutil.copytree(ROOT, tree, ignore=leave)
        if not passes(tree, sorted({m.tests for m in chosen})):
            print("the tests fail without a mutation")
            return 1
        for m in chosen:
            path = tree / m.file
            sound = path.read_text(encoding="utf-8")
            path.write_text(sound.replace(m.old, m.new), encoding="utf-8")
            survived = passes(tree, [m.tests])
            path.write_text(sound, encoding="utf-8")
            survivors += survived
            print(f"{'SURVIVED' if survived else 'killed'}  {m.file}: {m.old} -> {m.new}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
