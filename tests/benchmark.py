"""Measure the recipe against its peers, on the CIFAR-10 in ``data/``. Run by hand; pytest leaves it alone.

    python tests/benchmark.py              # one table: this recipe and two public ones, same wall time
    python tests/benchmark.py --speed      # only the speed part of it
    python tests/benchmark.py --quick      # the same in 2 minutes: 2 epochs, an eighth of the images
    python tests/benchmark.py --seeds 3    # the swapped network and its ReLU twin, for 3 seeds

Accuracies are on the test images, read once per finished training; nothing is chosen by them.
"""

import argparse
import dataclasses
import math
import platform
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torchvision
from PIL import Image
from scipy import stats
from torch import nn
from torchvision import models, transforms

import helpers

CLASS_NAMES = ["cat", "dog", "airplane"]
DEVICE = torch.device("cpu")


def load(data_dir):
    cifar10 = helpers.load_cifar10(data_dir, allow_stand_in=False, seed=0)
    id_mapping, _ = helpers.class_mapping(CLASS_NAMES)
    train = helpers.filter_and_relabel(cifar10.train_images, cifar10.train_labels, id_mapping)
    test = helpers.filter_and_relabel(cifar10.test_images, cifar10.test_labels, id_mapping)
    print(f"Data source: {cifar10.source}")
    return train, test


def split(train, seed):
    images, labels = train
    train_ids, val_ids = helpers.stratified_split(labels, 0.1, seed)
    return (images[train_ids], labels[train_ids]), (images[val_ids], labels[val_ids])


def swapped_network(seed, pretrained=False, swap=True):
    model = helpers.build_model("resnet18", seed)
    if pretrained:
        problem = helpers.load_imagenet_weights(model, "resnet18")
        if problem:
            raise SystemExit(f"--pretrained: {problem}")
    if swap:
        helpers.replace_relu(model, nn.SiLU, 7)
    helpers.replace_head(model, len(CLASS_NAMES), seed)
    return model


@torch.inference_mode()
def which_are_right(model, batches, dtype):
    """Which images a model gets right, by plain logits and averaged with the mirror image's: two bool arrays."""
    model.eval()
    plain, mirrored = [], []
    for images, targets in batches:
        with helpers.autocast(DEVICE, dtype):
            a, b = model(images).float(), model(images.flip(-1)).float()
        plain.append(a.argmax(1) == targets)
        mirrored.append((a + b).argmax(1) == targets)
    return torch.cat(plain).numpy(), torch.cat(mirrored).numpy()


def train_ours(train, test, seed, recipe, image_size, batch_size, dtype, swap=True, pretrained=False):
    """One training as in the notebook. Returns (history, which test images are right: plain, mirror-averaged)."""
    fitting, validating = split(train, seed)
    train_loader = helpers.make_loader(*fitting, helpers.train_transform, image_size, batch_size, seed)
    val_loader = helpers.make_loader(*validating, helpers.eval_transform, image_size, batch_size, seed)
    test_loader = helpers.make_loader(*test, helpers.eval_transform, image_size, batch_size, seed)
    model = swapped_network(seed, pretrained, swap)
    if not pretrained:
        helpers.whiten_stem(model, fitting[0], image_size)
    history = helpers.fit(
        model, recipe, train_loader, val_loader, image_size, DEVICE, dtype, seed,
        on_epoch=lambda line: print("   ", line, file=sys.stderr))
    return history, *which_are_right(model, test_loader, dtype)


# --- two public recipes, with the same swap and initialisation: PIL transforms, DataLoader, float32 ---


class PILImages(torch.utils.data.Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def public_recipe(steps_per_epoch):
    """Adam 1e-3, StepLR(7, 0.1), batch 64, 10 epochs, 32x32."""
    model = swapped_network(seed=1337)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7 * steps_per_epoch, 0.1)
    return model, optimizer, schedule


def lightning_recipe(steps_per_epoch, epochs):
    """3x3 stride-1 stem, no max-pool, SGD with a one-cycle rate up to 0.1, weight decay 5e-4, batch 64."""
    model = swapped_network(seed=1337)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps_per_epoch * epochs)
    return model, optimizer, schedule


def train_peer(name, train, test, seconds):
    """Train a public recipe for the given wall time, without validation; the last weights are tested.

    The one-cycle schedule is shaped for the epochs that fit. The public solution's steps stay where they are;
    ``after_10`` is its (seconds, accuracies) after the 10 epochs that its author trained, if it got so far.
    """
    normalise = [transforms.ToTensor(), transforms.Normalize(helpers.MEAN, helpers.STD)]
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    (images, labels), _ = split(train, 1337)
    torch.manual_seed(1337)
    loader = torch.utils.data.DataLoader(
        PILImages(images, labels, transforms.Compose(augment + normalise)), batch_size=64, shuffle=True, drop_last=True)
    test_loader = torch.utils.data.DataLoader(
        PILImages(*test, transforms.Compose(normalise)), batch_size=256)
    make = {"public": lambda: public_recipe(len(loader)), "lightning": lambda: lightning_recipe(len(loader), epochs)}[name]
    criterion = nn.CrossEntropyLoss()

    def step(model, optimizer, schedule, images, labels):
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()
        schedule.step()

    epochs = 1000  # first a few steps for the speed, then as many epochs as fit
    state, batches = make(), iter(loader)
    [step(*state, *next(batches)) for _ in range(3)]
    start = time.perf_counter()
    [step(*state, *next(batches)) for _ in range(8)]
    epochs = max(1, round(seconds / ((time.perf_counter() - start) / 8 * len(loader))))
    torch.manual_seed(1337)
    state = make()
    model = state[0]

    def accuracies():
        return [right.mean() for right in which_are_right(model, test_loader, torch.float32)]

    seen, taken, after_10 = 0, 0.0, None
    for epoch in range(1, epochs + 1):
        model.train()
        start = time.perf_counter()
        for images, labels in loader:
            step(*state, images, labels)
            seen += len(labels)
            if taken + time.perf_counter() - start > 1.1 * seconds:
                break
        taken += time.perf_counter() - start
        if taken > 1.1 * seconds:
            break
        if epoch == 10 and name == "public":
            after_10 = (taken, accuracies())
    return dict(seconds=taken, epochs=seen / (len(loader) * 64), accuracies=accuracies(), after_10=after_10)


# --- speed -----------------------------------------------------------------------------------------


def measure_speed(train, recipe, image_size, batch_size, dtype, steps, rounds):
    """The real loop against forward/backward/step on one resident batch: medians of several rounds.

    Returns images/s of the real loop, its share of the bare loop's, the same for a bare loop with
    torchvision's convolutions as they are, and the share of time that loading takes.
    """
    (images, labels), _ = split(train, 1337)
    loader = helpers.make_loader(images, labels, helpers.train_transform, image_size, batch_size, 1337)
    model = swapped_network(1337).to(memory_format=torch.channels_last).train()
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    optimizer = helpers.make_optimizer(model, recipe, dtype)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    x, y = helpers.to_device(*next(iter(loader)), DEVICE)

    def bare():
        with helpers.autocast(DEVICE, dtype):
            loss = criterion(model(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def real(batches):
        helpers.train_one_epoch(model, criterion, optimizer, scheduler, batches, DEVICE, dtype)

    def load():
        for _, batch in zip(range(steps), loader):
            helpers.to_device(*batch, DEVICE)

    class Few:
        def __iter__(self):
            return (batch for _, batch in zip(range(steps), loader))

    def timed(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def bare_loop():
        for _ in range(steps):
            bare()

    def bare_loop_of_ours():
        with helpers.small_maps_as_matmul(model):
            bare_loop()

    works = (lambda: real(Few()), bare_loop_of_ours, bare_loop, load)
    [work() for work in works]
    # In turns, so that a machine that slows down or speeds up does so for all of them.
    real_s, bare_s, plain_s, load_s = np.median([[timed(work) for work in works] for _ in range(rounds)], axis=0)
    return steps * batch_size / real_s, bare_s / real_s, plain_s / real_s, load_s / real_s


def seconds_an_epoch(train, share, recipe, image_size, batch_size, dtype):
    """Seconds of one training epoch on a share of the training images, and their number."""
    (images, labels), _ = split(train, 1337)
    images, labels = (part[:: int(1 / share)] for part in (images, labels))
    loader = helpers.make_loader(images, labels, helpers.train_transform, image_size, batch_size, 1337)
    model = swapped_network(1337).to(memory_format=torch.channels_last)
    optimizer = helpers.make_optimizer(model, recipe, dtype)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    start = time.perf_counter()
    helpers.train_one_epoch(model, nn.CrossEntropyLoss(), optimizer, scheduler, loader, DEVICE, dtype)
    return time.perf_counter() - start, len(loader) * batch_size


def peak_memory_gib():
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def mean_and_deviation(values):
    values = np.asarray(values, dtype=float)
    return values.mean(), values.std(ddof=1) if len(values) > 1 else math.nan


def compare_seeds(train, test, n_seeds, recipe, image_size, batch_size, dtype, pretrained):
    rows = []
    for seed in range(1337, 1337 + n_seeds):
        (h, _, a), (_, _, b) = (
            train_ours(train, test, seed, recipe, image_size, batch_size, dtype, swap, pretrained)
            for swap in (True, False))
        rows.append((a.mean(), b.mean(), h.seconds))
        print(f"| {seed} | {a.mean():.1%} | {b.mean():.1%} | {100 * (a.mean() - b.mean()):+.1f} | {h.seconds / 60:.1f} min |", flush=True)
    swapped, control, _ = map(np.array, zip(*rows))
    (m_a, s_a), (m_b, s_b), (m_d, s_d) = map(mean_and_deviation, (swapped, control, swapped - control))
    print(f"| mean ± s.d. | {m_a:.1%} ± {100 * s_a:.1f} | {m_b:.1%} ± {100 * s_b:.1f} | {100 * m_d:+.1f} ± {100 * s_d:.1f} | |")
    if n_seeds > 1:
        half = stats.t.ppf(0.975, n_seeds - 1) * s_d / math.sqrt(n_seeds)
        print(f"Difference over {n_seeds} seeds: {100 * m_d:+.1f} points (95% t interval {100 * (m_d - half):+.1f} to {100 * (m_d + half):+.1f})")


def compare_recipes(train, test, recipe, image_size, batch_size, dtype):
    """Print the accuracy table: this recipe, then its peers in the same wall time."""

    def row(label, epochs, seconds, accuracies):
        images = epochs * (int(0.9 * len(train[1])) // batch_size) * batch_size
        plain, mirrored = accuracies
        print(f"| {label} | {epochs:.1f} | {seconds / epochs:.1f} | {images / seconds:.0f} | {seconds / 60:.1f} min "
              f"| {plain:.1%} | {mirrored:.1%} |", flush=True)

    print("| recipe | epochs | s an epoch | images/s | training | test, plain | test, mirror-averaged |\n"
          "| --- | --- | --- | --- | --- | --- | --- |")
    history, *right = train_ours(train, test, 1337, recipe, image_size, batch_size, dtype)
    row("this one (with validation)", len(history.epochs), history.seconds, [r.mean() for r in right])
    memory = peak_memory_gib()  # before the peers raise it
    for name, label in (("public", "public solution"), ("lightning", "Lightning tutorial")):
        result = train_peer(name, train, test, history.seconds)
        if result["after_10"]:
            row(f"{label}, its own 10 epochs", 10, *result["after_10"])
        row(f"{label}, same wall time", result["epochs"], result["seconds"], result["accuracies"])
    print(f"\nPeak resident memory of this recipe's training, all of CIFAR-10 included: {memory:.2f} GiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="finish in 2 minutes")
    parser.add_argument("--speed", action="store_true", help="measure speed only, train nothing to its end")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="train the swapped network and its twin for N seeds")
    parser.add_argument("--pretrained", action="store_true", help="with --seeds: start from torchvision's weights")
    parser.add_argument("--data-dir", default=str(Path(__file__).resolve().parent.parent / "data"))
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, help="instead of the recipe's own number")
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    if args.pretrained and not args.seeds:
        parser.error("--pretrained needs --seeds N")

    helpers.seed_everything(1337)
    dtype = getattr(torch, args.precision)
    recipe = helpers.RECIPES["pretrained" if args.pretrained else "random"]
    if args.epochs or args.quick:
        recipe = dataclasses.replace(recipe, epochs=args.epochs or 2)
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
          f"torch {torch.__version__}, torchvision {torchvision.__version__}, {args.precision}")
    train, test = load(args.data_dir)
    if args.quick:
        train, test = (tuple(part[::8] for part in arrays) for arrays in (train, test))  # of every class

    if args.seeds:
        print("| seed | SiLU test | ReLU test | difference, points | training |\n| --- | --- | --- | --- | --- |")
        compare_seeds(train, test, args.seeds, recipe, args.image_size, args.batch_size, dtype, args.pretrained)
        return

    if not args.speed:
        compare_recipes(train, test, recipe, args.image_size, args.batch_size, dtype)
    print("\n| image side | images/s | of the bare loop | of the bare loop, plain convolutions | loading share |\n"
          "| --- | --- | --- | --- | --- |")
    for size in (32, 64) if args.quick else (32, 48, 64, 96, 128):
        rate, ratio, plain, loading = measure_speed(
            train, recipe, size, args.batch_size, dtype, steps=4 if args.quick else 10, rounds=3 if args.quick else 5)
        print(f"| {size} px | {rate:.0f} | {ratio:.1%} | {plain:.1%} | {loading:.1%} |", flush=True)
    print(f"\n| training images | s an epoch at {args.image_size} px |\n| --- | --- |")
    for share in (0.25, 0.5, 1):
        seconds, n = seconds_an_epoch(train, share, recipe, args.image_size, args.batch_size, dtype)
        print(f"| {n:,} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
