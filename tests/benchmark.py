"""Measure the recipe, on the official CIFAR-10 in ``data/``. Run by hand; pytest leaves it alone.

    python tests/benchmark.py                   # this recipe and two public ones, same wall time
    python tests/benchmark.py --study FILE.csv --seeds 1 2   # activations over seeds
    python tests/benchmark.py --speed           # the training loop against the bare loop
    python tests/benchmark.py --ablation        # the recipe with one part changed, cross-validated
    python tests/benchmark.py --probe           # what a swap breaks before any training

``--weights random`` measures the recipe for random initialisation. Test images are read once per
finished training and choose nothing; the ablation and the probe use the training images alone.
"""

import argparse
import csv
import itertools
import platform
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torchvision
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torchvision import transforms

import helpers

CLASS_NAMES = ["cat", "dog", "airplane"]


def load(data_dir):
    """The training and the test images of the three classes, and where they come from."""
    cifar10 = helpers.load_cifar10(data_dir, allow_stand_in=False, seed=0, urls=())
    id_mapping, _ = helpers.class_mapping(CLASS_NAMES)
    train, test = (helpers.filter_and_relabel(*part, id_mapping)
                   for part in (cifar10.train, cifar10.test))
    return train, test, cifar10.source


def split(train, seed):
    images, labels = train
    return [(images[ids], labels[ids]) for ids in helpers.stratified_split(labels, 0.1, seed)]


def network(seed, pretrained, activation="SiLU", frozen=(), first=7):
    """ResNet-18 with its new head; ``activation`` "ReLU" leaves every nn.ReLU in place."""
    torch.manual_seed(seed)
    model, sha256, label = helpers.build_model("resnet18", pretrained)
    if (sha256 != "random") != pretrained:
        raise SystemExit(label)
    helpers.freeze(model, frozen, helpers.find_modules(model, nn.ReLU)[first - 1][0])
    if activation != "ReLU":
        helpers.replace_relu(model, helpers.ACTIVATIONS[activation], first)
    torch.manual_seed(seed)
    helpers.replace_head(model, len(CLASS_NAMES))
    return model


def processor():
    """The processor's name and kind."""
    info = Path("/proc/cpuinfo")
    found = dict(re.findall(r"(.*\S)\s*: (.*)", info.read_text())) if info.exists() else {}
    return (f"{found.get('model name') or platform.processor()} cpu family "
            f"{found.get('cpu family')} model {found.get('model')}")


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def right_answers(model, images, labels, size, dtype):
    """Which of the images a model gets right, bool (N,)."""
    loader = helpers.make_loader(images, labels, train=False, image_size=size, batch_size=128)
    return helpers.evaluate(model, loader, dtype)[1]


def make_sgd(model, recipe):
    """In place of helpers.make_optimizer: SGD with Nesterov momentum."""
    groups = [{key: group[key] for key in ("params", "weight_decay")}
              for group in ADAMW(model, recipe).param_groups]
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)


ADAMW = helpers.make_optimizer


def train_ours(fitting, validating, seed, recipe, args, dtype, activation="SiLU", batch_size=128,
               augment=None, sgd=False):
    """One training as in the notebook: (model, history)."""
    helpers.make_optimizer = make_sgd if sgd else ADAMW
    sizes = dict(image_size=recipe.image_size, batch_size=batch_size)
    train_loader = helpers.make_loader(*fitting, train=True, **sizes)
    val_loader = helpers.make_loader(*validating, train=False, **sizes)
    if augment:
        train_loader.dataset.augment = transforms.Compose(augment)
    model = network(seed, args.weights == "pretrained", activation, recipe.frozen, args.first)
    helpers.seed_everything(seed)
    history = helpers.fit(
        model, train_loader, val_loader, recipe=recipe, dtype=dtype,
        on_epoch=lambda line: print("   ", line, file=sys.stderr, flush=True))
    return model, history


# ==== Study ======================================================================================


def study(train, test, source, recipe, args, dtype):
    """Train every activation with every seed; each finished one becomes a row of the CSV file.

    Rows that are there are not repeated. A file of other images, weights or recipe is refused.
    ``right`` are the right answers on the test images, packed to bits, in hexadecimal.
    """
    path = Path(args.study)
    _, weights, _ = helpers.build_model("resnet18", args.weights == "pretrained")
    fixed = {"model": "resnet18", "classes": [*helpers.class_mapping(CLASS_NAMES)[1]],
             "images": source, "weights": weights, "precision": args.precision, "batch_size": 128,
             **asdict(recipe)}
    rows = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    for row, (name, value) in itertools.product(rows, fixed.items()):
        if row[name] != str(value):
            raise SystemExit(f"{path} has {name} {row[name]}, not {value}: use another file.")
    done = [{name: row[name] for name in ("swap", "seed")} for row in rows]
    for seed, activation in itertools.product(args.seeds, args.activations):
        key = {"swap": f"{activation} from {args.first}", "seed": str(seed)}
        if key in done:
            continue
        model, history = train_ours(*split(train, seed), seed, recipe, args, dtype, activation)
        right = right_answers(model, *test, recipe.image_size, dtype)
        row = {**key, **fixed, "trainable": helpers.count_parameters(model)[1],
               "processor": processor(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "torchvision": torchvision.__version__,
               "minutes": f"{history.seconds / 60:.1f}",
               "validation": " ".join(f"{m.val_accuracy:.4f}" for m in history.epochs),
               "test": f"{right.mean():.4f}", "right": np.packbits(right).tobytes().hex()}
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
    print(study_table(found := helpers.read_study(path, recipe), len(test[1])))
    helpers.plot_study(found).savefig(
        path.with_suffix(".png"), metadata={"Comment": helpers.hash_file(path, "sha256")})


def study_table(study, n_images):
    """A markdown table with a row for each swap; ± is half of a 95% interval.

    Beside the seeds' spread stands what is expected of the chance of training alone, the square
    root of error / 2 n (Jordan 2023, arXiv 2304.01910).
    """
    lines = ["| swap | seeds | test | ReLU's | difference, points | within 1 point | seeds' spread "
             "(expected) | validation, each epoch's difference |", "| --- " * 8 + "|"]
    for swap, (own, relu) in study.items():
        *validation, test = [f"{100 * d.mean:+.2f} ± {100 * (d.high - d.mean):.2f}"
                             for d in map(helpers.paired_difference, own.T, relu.T)]
        own, relu = own[:, -1], relu[:, -1]
        p_value = helpers.equivalence_p(own - relu)
        lines.append(
            f"| {swap} | {len(own)} | {own.mean():.2%} | {relu.mean():.2%} | {test} | "
            f"{'yes' if p_value < 0.05 else 'not shown'}, p {p_value:.2g} | "
            f"{100 * own.std(ddof=1):.2f} ({100 * ((1 - own.mean()) / 2 / n_images) ** 0.5:.2f}) | "
            f"{', '.join(validation)} |")
    return "\n".join(lines)


# ==== Ablation ===================================================================================

CROP = [transforms.RandomCrop(32, padding=4, padding_mode="reflect")]
FLIP = [transforms.RandomHorizontalFlip()]
STEM = ("conv1", "bn1", "layer1")
SGD = dict(sgd=True, weight_decay=5e-4)
# What is changed: fields of the recipe, the batch size, the optimiser, or the augmentation.
VARIANTS = {
    "pretrained": {
        "rate 2e-4": dict(lr=2e-4), "rate 1e-3": dict(lr=1e-3), "SGD 0.03": dict(SGD, lr=0.03),
        "batch 64": dict(batch_size=64), "3 epochs": dict(epochs=3), "6 epochs": dict(epochs=6),
        "nothing frozen, 3 epochs": dict(frozen=(), epochs=3),
        "layer2 frozen, too, 5 epochs": dict(frozen=(*STEM, "layer2"), epochs=5),
        "112 px, 3 epochs": dict(image_size=112, epochs=3), "128 px": dict(image_size=128),
        "128 px, 3 epochs": dict(image_size=128, epochs=3),
        "no label smoothing": dict(label_smoothing=0.0),
        "ColorJitter": dict(augment=CROP + FLIP + [transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)]),
        "RandomResizedCrop": dict(augment=FLIP + [
            transforms.RandomResizedCrop(32, scale=(0.5, 1), antialias=True)])},
    "random": {
        "batch 64": dict(batch_size=64), "14 epochs": dict(epochs=14),
        "14 epochs, SGD 0.1": dict(SGD, lr=0.1, epochs=14),
        "64 px, 13 epochs": dict(image_size=64, epochs=13),
        "64 px, 13 epochs, SGD 0.1": dict(SGD, lr=0.1, image_size=64, epochs=13)}}


def ablate(train, recipe, args, dtype):
    """Cross-validate each variant on the training images; print its row.

    Differences are paired over images: the standard error leaves out the chance of training.
    """
    print("| variant | min each | accuracy | difference ± s.e., points |\n" + "| --- " * 4 + "|")
    images, labels = train
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(images, labels))
    of_recipe = None
    for name in ["recipe", *(args.only or VARIANTS[args.weights])]:
        change = {} if name == "recipe" else dict(VARIANTS[args.weights][name])
        extras = {key: change.pop(key) for key in ("batch_size", "augment", "sgd") if key in change}
        variant, right, seconds = replace(recipe, **change), [], []
        for fit_ids, score_ids in folds[:args.folds]:
            scored = images[score_ids], labels[score_ids]
            model, history = train_ours(
                (images[fit_ids], labels[fit_ids]), [part[:128] for part in scored], 1337, variant,
                args, dtype, **extras)
            seconds.append(history.seconds)
            right.append(right_answers(model, *scored, variant.image_size, dtype))
        right = np.concatenate(right).astype(float)
        of_recipe = right if of_recipe is None else of_recipe
        gain = 100 * (right - of_recipe)
        error = gain.std(ddof=1) / len(gain) ** 0.5
        difference = "" if name == "recipe" else f"{gain.mean():+.2f} ± {error:.2f}"
        print(f"| {name} | {np.mean(seconds) / 60:.1f} | {right.mean():.2%} | {difference} |",
              flush=True)


# ==== Probe ======================================================================================


def probe(train, recipe, args):
    """Print the notebook's probe of every swap: mean ± standard error of five splits."""
    def subset(part, n):
        return helpers.make_loader(*(x[:n] for x in part), train=False, batch_size=100,
                                   image_size=recipe.image_size)

    swaps = list(itertools.product(helpers.ACTIVATIONS, (7, 4, 1)))
    networks = [network(0, True, activation, first=first)
                for activation, first in [("ReLU", 1), *swaps]]
    scores = []  # split, statistics, network
    for seed in range(5):
        loaders = [subset([x[np.random.default_rng(seed).permutation(len(x))] for x in part], n)
                   for part, n in zip(split(train, seed), (600, 500))]
        found = helpers.compare_statistics(
            lambda model: 100 * helpers.linear_probe(model, *loaders).mean(), loaders[0], *networks)
        scores.append([*found.values()])
        print(f"split {seed} done", file=sys.stderr, flush=True)
    of_relu, *of_swaps = np.array(scores).transpose(2, 1, 0)
    print("| swap, not trained | statistics as they are | difference | estimated again | "
          "difference |\n| --- | --- | --- | --- | --- |")
    for (activation, first), of_swap in zip(swaps, of_swaps):
        cells = [f"{activation} from {first}"]
        for swapped, relu in zip(of_swap, of_relu):
            gain = swapped - relu
            cells += [f"{relu.mean():.1f}% → {swapped.mean():.1f}%",
                      f"{gain.mean():+.1f} ± {gain.std(ddof=1) / 5 ** 0.5:.1f}"]
        print("| " + " | ".join(cells) + " |")


# ==== Two public recipes, with the same swap, in float32 ==========================================


def public_recipe(n_steps):
    """From ImageNet weights: Adam 1e-3, a tenth after 70% of the steps, batch 64, 32x32."""
    model = network(1337, pretrained=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, int(0.7 * n_steps))


def lightning_recipe(n_steps):
    """From random weights: 3x3 stem, no max-pool, SGD, one cycle up to 0.1, batch 64."""
    model = network(1337, pretrained=False)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, n_steps)


def train_peer(make, train, test, seconds):
    """Train a public recipe for the given wall time, without validation; the last weights count."""
    helpers.seed_everything(1337)
    loader = helpers.make_loader(*split(train, 1337)[0], train=True, image_size=32, batch_size=64)
    loader.dataset.augment = transforms.Compose([transforms.RandomCrop(32, padding=4), *FLIP])

    def run(batches, model, optimizer, scheduler):
        helpers.train_one_epoch(
            model, nn.CrossEntropyLoss(), optimizer, batches, scheduler=scheduler)

    few, state = list(itertools.islice(loader, 8)), make(1000)
    epochs = round(seconds / (timed(lambda: run(few, *state)) / len(few) * len(loader))) or 1
    helpers.seed_everything(1337)
    state = make(len(loader) * epochs)
    taken = timed(lambda: [run(loader, *state) for _ in range(epochs)])
    right = right_answers(state[0], *test, 32, torch.float32)
    return 64 * len(loader) * epochs, taken, right.mean()


def compare_recipes(train, test, recipe, args, dtype):
    """Print the accuracy table: this recipe, then its peers in the same wall time."""
    fitting, validating = split(train, 1337)

    def row(label, seen, seconds, accuracy):
        print(f"| {label} | {seen / len(fitting[1]):.1f} | {seen / seconds:.0f} | "
              f"{seconds / 60:.1f} | {accuracy:.1%} |", flush=True)

    print("| recipe | epochs | images/s | min | test, plain |\n| --- | --- | --- | --- | --- |")
    model, history = train_ours(fitting, validating, 1337, recipe, args, dtype)
    row("this one (with validation)", len(history.epochs) * len(fitting[1]), history.seconds,
        right_answers(model, *test, recipe.image_size, dtype).mean())
    for label, make in (
            ("public solution", public_recipe), ("Lightning tutorial", lightning_recipe)):
        row(label, *train_peer(make, train, test, history.seconds))


# ==== Speed ======================================================================================


def measure_speed(train, recipe, args, dtype, steps=10, rounds=5):
    """Print images/s, the share of the bare loop's speed, and the share of time for loading.

    Medians. The bare loop is forward, backward and step on one batch in memory.
    """
    loader = helpers.make_loader(*split(train, 1337)[0], train=True, image_size=recipe.image_size,
                                 batch_size=128)
    model = network(1337, args.weights == "pretrained", frozen=recipe.frozen)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = helpers.make_optimizer(model, recipe)
    x, y = next(iter(loader))

    def real():
        batches = itertools.islice(loader, steps)
        helpers.train_one_epoch(model, criterion, optimizer, batches, dtype)

    def bare():
        for _ in range(steps):
            logits = helpers.forward(model, x, dtype)
            optimizer.zero_grad()
            criterion(logits, y).backward()
            optimizer.step()

    works = real, bare, lambda: list(itertools.islice(loader, steps))
    [work() for work in works]
    # In turns, so that a machine that slows down or speeds up does so for all of them.
    times = np.median([[timed(work) for work in works] for _ in range(rounds)], axis=0)
    rate, ratio, loading = steps * 128 / times[0], times[1] / times[0], times[2] / times[0]
    print("| images/s | of the bare loop | loading |\n| --- | --- | --- |\n"
          f"| {rate:.0f} | {ratio:.1%} | {loading:.1%} |")


def peak_memory():
    """Peak resident memory of this process, as text; unknown on Windows."""
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="only the speed of the loop")
    parser.add_argument("--probe", action="store_true", help="what a swap breaks before training")
    parser.add_argument("--ablation", action="store_true", help="what each part brings")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants of the ablation",
                        choices=[*itertools.chain(*VARIANTS.values())])
    parser.add_argument("--folds", type=int, default=3, help="of the ablation, 1 to 3")
    parser.add_argument("--study", metavar="FILE", help="a CSV file of trainings, to go on with")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337], help="of the study")
    parser.add_argument("--activations", nargs="+", default=["ReLU", *helpers.ACTIVATIONS],
                        choices=["ReLU", *helpers.ACTIVATIONS], help="of the study")
    parser.add_argument("--first", type=int, default=7, help="occurrence from which to replace")
    parser.add_argument("--weights", default="pretrained", choices=["pretrained", "random"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    helpers.seed_everything(1337)
    dtype, recipe = getattr(torch, args.precision), helpers.RECIPES[args.weights]
    print(f"{processor()}\n{args.precision}, "
          f"{helpers.environment_summary(1337, 'cpu')}\n{recipe}")
    train, test, source = load(ROOT / "data")
    print(f"Data source: {source}", flush=True)
    if args.probe:
        probe(train, recipe, args)
    elif args.ablation:
        ablate(train, recipe, args, dtype)
    elif args.study:
        study(train, test, source, recipe, args, dtype)
    elif args.speed:
        measure_speed(train, recipe, args, dtype)
    else:
        compare_recipes(train, test, recipe, args, dtype)
    print(f"\nPeak resident memory: {peak_memory()}")


if __name__ == "__main__":
    main()
