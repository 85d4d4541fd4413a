"""Three ways to train one small network, each at the same cost, on scikit-learn's handwritten digits.

    python examples/quickstart.py

Natural training; Free, the paper's; and N-FGSM, one gradient of the input before each update. Prints their accuracy,
clean and under attack, and draws attacked digits with what each network says (quickstart.png).
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from free_adv import FreeAdversarial, ThreatModel, evaluate, pgd

torch.set_num_threads(1)  # the network is too small for several: they would wait for one another
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # 8x8 pixels in [0, 1]
parts = train_test_split(images, torch.tensor(digits.target), test_size=0.2, random_state=0)
x_train, x_test, y_train, y_test = parts
loader = DataLoader(TensorDataset(x_train, y_train), batch_size=64, shuffle=True)
test_loader = DataLoader(TensorDataset(x_test, y_test), batch_size=360)


def start(epochs):
    """A new network, its optimizer, and a schedule of as many updates as these epochs of `loader` have."""
    torch.manual_seed(0)
    layers = []
    for channels, width, stride in ((1, 32, 1), (32, 64, 2), (64, 64, 1)):
        conv = nn.Conv2d(channels, width, 3, stride, padding=1)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updates = epochs * len(loader)
    return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, updates)


criterion = nn.CrossEntropyLoss()
print("training three times, at the same cost ...")

model, optimizer, schedule = start(24)
for _ in range(24):
    for x, y in loader:
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
natural = model

model, optimizer, schedule = start(24)
free = FreeAdversarial(optimizer, eps=0.15, replays=8)
for _ in range(free.epochs(24)):  # 3
    for x, y in free.replay(loader):  # each batch 8 times, x perturbed
        loss = criterion(model(x), y)
        free.step(loss)
        schedule.step()
robust = model

model, optimizer, schedule = start(15)
n_fgsm = {"replays": 1, "ascents": 1, "start": "zero", "noise": 2}
free = FreeAdversarial(
    optimizer, eps=0.15, objective=lambda batch: criterion(model(batch[0]), batch[1]), **n_fgsm
)
for _ in range(free.epochs(24)):  # 15
    for x, y in free.replay(loader):  # each batch once, x climbs before the update
        loss = criterion(model(x), y)
        free.step(loss)
        schedule.step()
climbed = model

threat = ThreatModel(eps=0.15)
print(f"{'':<10}{'clean':>7}{'PGD-20':>9}   eps 0.15")
models = {"natural": natural, "Free": robust, "N-FGSM": climbed}
for name, model in models.items():
    found = evaluate(model, test_loader, threat, steps=20, progress=False)
    print(f"{name:<10}{found.clean:>7.1%}{found.robust:>9.1%}")

figure, rows = plt.subplots(3, 10, figsize=(9, 3.4), layout="constrained")
x, y = x_test[:10], y_test[:10]
for row, (name, model) in zip(rows, models.items(), strict=True):
    attacked = pgd(model, x, y, threat, steps=20)
    guesses = model(attacked).argmax(1)
    for cell, image, truth, guess in zip(row, attacked, y, guesses, strict=True):
        cell.imshow(image[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
        cell.set(xticks=[], yticks=[])
        cell.set_title(int(guess), color="black" if guess == truth else "red")
    row[0].set_ylabel(name)
figure.suptitle("attacked digits, and what each network takes them for (red: wrong)")
figure.savefig("quickstart.png")
print("picture: quickstart.png")
