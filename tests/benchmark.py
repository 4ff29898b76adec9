"""Measure the recipe, on the official CIFAR-10 in ``data/``. Run by hand; pytest leaves it alone.

    python tests/benchmark.py                        # this recipe and two public ones, same wall time
    python tests/benchmark.py --seeds 1337 1338      # this recipe alone, over seeds
    python tests/benchmark.py --speed                # the training loop against the bare loop
    python tests/benchmark.py --ablation             # the recipe with one part changed, cross-validated
    python tests/benchmark.py --probe                # what a swap breaks before any training

``--weights random`` measures the recipe for random initialisation. Test images are read once per
finished training and choose nothing; the ablation and the probe use the training images alone.
"""

import argparse
import itertools
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torchvision import transforms

import helpers

CLASS_NAMES = ["cat", "dog", "airplane"]
DEVICE = torch.device("cpu")


def load(data_dir):
    cifar10 = helpers.load_cifar10(data_dir, allow_stand_in=False, seed=0, urls=())
    id_mapping, _ = helpers.class_mapping(CLASS_NAMES)
    print(f"Data source: {cifar10.source}")
    return tuple(helpers.filter_and_relabel(images, labels, id_mapping) for images, labels in (
        (cifar10.train_images, cifar10.train_labels), (cifar10.test_images, cifar10.test_labels)))


def split(train, seed):
    images, labels = train
    return [(images[ids], labels[ids]) for ids in helpers.stratified_split(labels, 0.1, seed)]


def network(seed, pretrained, activation="SiLU", frozen=(), first=7):
    """ResNet-18 with its new head; ``activation`` "ReLU" leaves every nn.ReLU in place."""
    model, weights = helpers.build_model("resnet18", pretrained, seed)
    if pretrained and not weights.pretrained:
        raise SystemExit(weights.note)
    helpers.freeze(model, frozen, helpers.find_modules(model, nn.ReLU)[6][0])
    if activation != "ReLU":
        helpers.replace_relu(model, helpers.ACTIVATIONS[activation], first)
    helpers.replace_head(model, len(CLASS_NAMES), seed)
    return model


def processor():
    """Its name, and the rates of a product of two 2,048 x 2,048 matrices."""
    found = {"model name": platform.processor() or platform.machine()}
    if Path("/proc/cpuinfo").exists():
        lines = [line.split(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
        found.update((line[0].strip(), line[1].strip()) for line in lines if len(line) == 2)
    numbers = ", ".join(f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(2048, 2048, dtype=dtype)
        seconds = min(timed(lambda: matrix @ matrix) for _ in range(3))
        rates.append(f"{2 * 2048**3 / seconds / 1e9:.0f} GFLOP/s in {str(dtype)[6:]}")
    return f"{found['model name']} ({numbers}); {', '.join(rates)}; {torch.get_num_threads()} threads"


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def right_answers(model, images, labels, size, dtype):
    """Which of the images a model gets right, bool (N,)."""
    loader = helpers.make_loader(
        images, labels, train=False, image_size=size, batch_size=128, seed=0)
    return helpers.right_answers(model, loader, DEVICE, dtype)


def make_sgd(model, recipe):
    """In place of helpers.make_optimizer: SGD with Nesterov momentum."""
    adamw = ADAMW(model, recipe)
    return torch.optim.SGD([{k: group[k] for k in ("params", "weight_decay")}
                            for group in adamw.param_groups],
                           lr=recipe.lr, momentum=0.9, nesterov=True)


ADAMW = helpers.make_optimizer


def train_ours(fitting, validating, seed, recipe, args, dtype, activation="SiLU", batch_size=128,
               augment=None, sgd=False):
    """One training as in the notebook: (model, history)."""
    helpers.make_optimizer = make_sgd if sgd else ADAMW
    sizes = dict(image_size=recipe.image_size, batch_size=batch_size, seed=seed)
    train_loader = helpers.make_loader(*fitting, train=True, **sizes)
    val_loader = helpers.make_loader(*validating, train=False, **sizes)
    if augment:
        train_loader.dataset.augment = transforms.Compose(augment)
    model = network(seed, args.weights == "pretrained", activation, recipe.frozen)
    helpers.seed_everything(seed, [train_loader.generator])
    history = helpers.fit(
        model, train_loader, val_loader, recipe=recipe, device=DEVICE, dtype=dtype,
        on_epoch=lambda line: print("   ", line, file=sys.stderr, flush=True))
    return model, history


# ==== Over seeds =================================================================================


def over_seeds(train, test, recipe, args, dtype):
    """Print a row for each seed, and the mean of the plain test accuracies."""
    print("| seed | min | validation | test, plain |\n| --- | --- | --- | --- |")
    accuracies = []
    for seed in args.seeds:
        model, history = train_ours(*split(train, seed), seed, recipe, args, dtype, args.activation)
        accuracies.append(right_answers(model, *test, recipe.image_size, dtype).mean())
        print(f"| {seed} | {history.seconds / 60:.1f} | {history.epochs[-1].val_accuracy:.1%} | "
              f"{accuracies[-1]:.2%} |", flush=True)
    print(f"\nMean of {len(accuracies)} seeds: {np.mean(accuracies):.2%}")


# ==== Ablation ===================================================================================

CROP = [transforms.RandomCrop(32, padding=4, padding_mode="reflect")]
FLIP = [transforms.RandomHorizontalFlip()]
STEM = ("conv1", "bn1", "layer1")
# What is changed: fields of the recipe, the batch size, or the augmentation.
VARIANTS = {
    "pretrained": {
        "recipe": {},
        "rate 2e-4": dict(lr=2e-4), "rate 1e-3": dict(lr=1e-3),
        "SGD 0.01": dict(sgd=True, lr=0.01, weight_decay=5e-4),
        "SGD 0.03": dict(sgd=True, lr=0.03, weight_decay=5e-4),
        "SGD 0.1": dict(sgd=True, lr=0.1, weight_decay=5e-4),
        "nothing frozen, 3 epochs": dict(frozen=(), epochs=3),
        "layer2 frozen, too": dict(frozen=(*STEM, "layer2")),
        "128 px, 3 epochs": dict(image_size=128, epochs=3),
        "128 px, 4 epochs": dict(image_size=128),
        "128 px, layer2 frozen, too, 3 epochs": dict(
            image_size=128, epochs=3, frozen=(*STEM, "layer2")),
        "160 px, layer2 frozen, too, 2 epochs": dict(
            image_size=160, epochs=2, frozen=(*STEM, "layer2")),
        "2 epochs": dict(epochs=2), "3 epochs": dict(epochs=3), "6 epochs": dict(epochs=6),
        "batch 64": dict(batch_size=64),
        "no label smoothing": dict(label_smoothing=0.0),
        "random resized crop, scale 0.5 to 1": dict(augment=FLIP + [
            transforms.RandomResizedCrop(32, scale=(0.5, 1), antialias=True)]),
        "ColorJitter": dict(augment=CROP + FLIP + [transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)]),
        "TrivialAugmentWide": dict(augment=CROP + FLIP + [transforms.TrivialAugmentWide()]),
        "RandAugment": dict(augment=CROP + FLIP + [transforms.RandAugment()])},
    "random": {
        "recipe": {},
        "AdamW 1e-3": dict(lr=1e-3), "AdamW 6e-3": dict(lr=6e-3),
        "batch 64": dict(batch_size=64), "48 px, 20 epochs": dict(image_size=48, epochs=20),
        "SGD 0.03": dict(sgd=True, lr=0.03, weight_decay=5e-4),
        "SGD 0.1": dict(sgd=True, lr=0.1, weight_decay=5e-4),
        "SGD 0.3": dict(sgd=True, lr=0.3, weight_decay=5e-4)}}


def ablate(train, recipe, args, dtype):
    """Cross-validate each variant on the training images; print its row.

    The difference to the recipe is paired over the same images: its standard error covers the
    choice of images, not the chance of training.
    """
    print("| variant | min a training | accuracy | difference ± s.e., points |\n"
          "| --- | --- | --- | --- |")
    images, labels = train
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(images, labels))
    of_recipe = None
    for name in ["recipe", *(args.only or list(VARIANTS[args.weights])[1:])]:
        change = dict(VARIANTS[args.weights][name])
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
    """Print the notebook's probe of every swap, over five splits and subsets: mean ± s.e. of five."""
    def subset(part, n):
        return helpers.make_loader(*(x[:n] for x in part), train=False, batch_size=100, seed=0,
                                   image_size=recipe.image_size)

    swaps = [("ReLU", 7), *itertools.product(helpers.ACTIVATIONS, (7, 4, 1))]
    scores = np.zeros((5, len(swaps), 2))
    for seed in range(5):
        fitting, validating = ((images[order], labels[order]) for images, labels in split(train, seed)
                               for order in [np.random.default_rng(seed).permutation(len(labels))])
        loaders = subset(fitting, 600), subset(validating, 500)
        for i, (activation, first) in enumerate(swaps):
            model = network(0, True, activation, first=first)
            again = helpers.reestimate_statistics(model, loaders[0], DEVICE)
            scores[seed, i] = [helpers.linear_probe(m, *loaders, DEVICE).mean() for m in (model, again)]
        print(f"split {seed} done", file=sys.stderr, flush=True)
    print("| network, not trained | statistics as they are | difference to ReLU | statistics estimated "
          "again | difference to ReLU |\n| --- | --- | --- | --- | --- |")
    for i, (activation, first) in enumerate(swaps):
        cells = [f"{activation} from {first}" if i else "ReLU, as it is"]
        for kind in (0, 1):
            gain = 100 * (scores[:, i, kind] - scores[:, 0, kind])
            cells += [f"{scores[:, i, kind].mean():.1%}",
                      f"{gain.mean():+.1f} ± {gain.std(ddof=1) / 5 ** 0.5:.1f}" if i else ""]
        print("| " + " | ".join(cells) + " |")


# ==== Two public recipes, with the same swap, in float32 ==========================================


def public_recipe(steps_per_epoch, epochs):
    """From ImageNet weights: Adam 1e-3, a tenth after 70% of the epochs, batch 64, 32x32."""
    model = network(1337, pretrained=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(
        optimizer, max(1, int(0.7 * epochs * steps_per_epoch)), 0.1)


def lightning_recipe(steps_per_epoch, epochs):
    """From random weights: 3x3 stem, no max-pool, SGD, one cycle up to 0.1, decay 5e-4, batch 64."""
    model = network(1337, pretrained=False)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=steps_per_epoch * epochs)


PEERS = {"public solution": public_recipe, "Lightning tutorial": lightning_recipe}


def train_peer(make, train, test, seconds):
    """Train a public recipe for the given wall time, without validation; the last weights count."""
    fitting, _ = split(train, 1337)
    helpers.seed_everything(1337)
    loader = helpers.make_loader(*fitting, train=True, image_size=32, batch_size=64, seed=1337)
    loader.dataset.augment = transforms.Compose([transforms.RandomCrop(32, padding=4), *FLIP])

    def step(model, optimizer, schedule, images, labels):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        schedule.step()

    state, batches = make(len(loader), 1000), iter(loader)  # a few steps for the speed
    [step(*state, *next(batches)) for _ in range(3)]
    a_step = timed(lambda: [step(*state, *next(batches)) for _ in range(8)]) / 8
    epochs = max(1, round(seconds / (a_step * len(loader))))
    helpers.seed_everything(1337)
    state = make(len(loader), epochs)
    seen, start = 0, time.perf_counter()
    state[0].train()
    for images, labels in (batch for _ in range(epochs) for batch in loader):
        step(*state, images, labels)
        seen += len(labels)
        if time.perf_counter() - start > 1.1 * seconds:
            break
    taken = time.perf_counter() - start
    return seen, taken, right_answers(state[0], *test, 32, torch.float32).mean()


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
    for label, make in PEERS.items():
        row(label, *train_peer(make, train, test, history.seconds))


# ==== Speed ======================================================================================


def measure_speed(train, recipe, args, dtype, steps=10, rounds=5):
    """(images/s, share of the bare loop's speed, share of time that loading takes), medians.

    The bare loop is forward, backward and step on one batch in memory.
    """
    loader = helpers.make_loader(*split(train, 1337)[0], train=True, image_size=recipe.image_size,
                                 batch_size=128, seed=1337)
    model = network(1337, args.weights == "pretrained", frozen=recipe.frozen)
    model.to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = helpers.make_optimizer(model, recipe)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    x, y = helpers.to_device(*next(iter(loader)), DEVICE)

    def few():
        return (batch for _, batch in zip(range(steps), loader))

    def real():
        helpers.train_one_epoch(model, criterion, optimizer, scheduler, few(), DEVICE, dtype)

    def bare():
        for _ in range(steps):
            logits = helpers.forward(model, x, dtype)
            optimizer.zero_grad()
            criterion(logits, y).backward()
            optimizer.step()

    def loading():
        for batch in few():
            helpers.to_device(*batch, DEVICE)

    works = real, bare, loading
    [work() for work in works]
    # In turns, so that a machine that slows down or speeds up does so for all of them.
    times = np.median([[timed(work) for work in works] for _ in range(rounds)], axis=0)
    return steps * 128 / times[0], times[1] / times[0], times[2] / times[0]


def peak_memory():
    """Peak resident memory of this process, as text; unknown on Windows."""
    try:
        import resource
    except ImportError:
        return "unknown"
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="only the speed of the loop")
    parser.add_argument("--probe", action="store_true", help="what a swap breaks before training")
    parser.add_argument("--ablation", action="store_true", help="what each part brings")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants of the ablation")
    parser.add_argument("--folds", type=int, default=3, help="of the ablation, 1 to 3")
    parser.add_argument("--seeds", nargs="+", type=int, help="train this recipe with each")
    parser.add_argument("--activation", default="SiLU", choices=["ReLU", *helpers.ACTIVATIONS])
    parser.add_argument("--weights", default="pretrained", choices=["pretrained", "random"])
    parser.add_argument("--data-dir", default=str(Path(__file__).resolve().parent.parent / "data"))
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    unknown = set(args.only or ()) - set(VARIANTS[args.weights])
    if unknown:
        parser.error(f"--only takes {list(VARIANTS[args.weights])}")

    helpers.seed_everything(1337)
    dtype, recipe = getattr(torch, args.precision), helpers.RECIPES[args.weights]
    print(f"{processor()}\n{args.precision}, {helpers.environment_summary(1337, DEVICE)}\n{recipe}")
    train, test = load(args.data_dir)
    if args.probe:
        probe(train, recipe, args)
    elif args.ablation:
        ablate(train, recipe, args, dtype)
    elif args.seeds:
        over_seeds(train, test, recipe, args, dtype)
    elif args.speed:
        print("| images/s | of the bare loop | loading |\n| --- | --- | --- |")
        rate, ratio, loading = measure_speed(train, recipe, args, dtype)
        print(f"| {rate:.0f} | {ratio:.1%} | {loading:.1%} |")
    else:
        compare_recipes(train, test, recipe, args, dtype)
    print(f"\nPeak resident memory: {peak_memory()}")


if __name__ == "__main__":
    main()
