"""Inception v3 in PyTorch, written out with torchvision's names: what tests/test_parity.py compares with.

torchvision itself does not import beside the torch that installs everywhere. `n` divides all widths.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu


class Conv(nn.Module):
    def __init__(self, before: int, after: int, size: Any, **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(before, after, size, bias=False, **options)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Any) -> Any:
        return relu(self.bn(self.conv(x)))


class Branches(nn.Module):
    """Units by name, each given its features; `wide` is what comes in."""

    def __init__(self, wide: int, n: int, **units: Any):
        super().__init__()
        before: dict[str, int] = {}
        for name, (after, size, pad, *stride) in units.items():
            branch, _, number = name.rpartition("_")
            branch = branch if number[:1].isdigit() else name
            came = before.get(branch, wide)
            options = {"padding": pad, "stride": stride[0] if stride else 1}
            self.add_module(name, Conv(came, after // n, size, **options))
            if not number.endswith("a"):
                before[branch] = after // n

    def through(self, x: Any, *names: str) -> Any:
        for name in names:
            x = getattr(self, name)(x)
        return x


def pooled(x: Any) -> Any:
    return avg_pool2d(x, 3, stride=1, padding=1)


class A(Branches):
    def __init__(self, wide: int, n: int, pool: int):
        units = {"branch1x1": (64, 1, 0), "branch5x5_1": (48, 1, 0), "branch5x5_2": (64, 5, 2)}
        units |= {"branch3x3dbl_1": (64, 1, 0), "branch3x3dbl_2": (96, 3, 1), "branch3x3dbl_3": (96, 3, 1)}
        super().__init__(wide, n, **units, branch_pool=(pool, 1, 0))

    def forward(self, x: Any) -> Any:
        five = self.through(x, "branch5x5_1", "branch5x5_2")
        three = self.through(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(pooled(x))], 1)


class B(Branches):
    def __init__(self, wide: int, n: int):
        units = {"branch3x3dbl_1": (64, 1, 0), "branch3x3dbl_2": (96, 3, 1), "branch3x3dbl_3": (96, 3, 0, 2)}
        super().__init__(wide, n, branch3x3=(384, 3, 0, 2), **units)

    def forward(self, x: Any) -> Any:
        three = self.through(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), three, max_pool2d(x, 3, stride=2)], 1)


class C(Branches):
    def __init__(self, wide: int, n: int, c: int):
        row, column = ((1, 7), (0, 3)), ((7, 1), (3, 0))
        units = {"branch7x7_1": (c, 1, 0), "branch7x7_2": (c, *row), "branch7x7_3": (192, *column)}
        units |= {"branch7x7dbl_1": (c, 1, 0), "branch7x7dbl_2": (c, *column), "branch7x7dbl_3": (c, *row)}
        units |= {"branch7x7dbl_4": (c, *column), "branch7x7dbl_5": (192, *row)}
        super().__init__(wide, n, branch1x1=(192, 1, 0), **units, branch_pool=(192, 1, 0))

    def forward(self, x: Any) -> Any:
        seven = self.through(x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        twice = self.through(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        return torch.cat([self.branch1x1(x), seven, twice, self.branch_pool(pooled(x))], 1)


class D(Branches):
    def __init__(self, wide: int, n: int):
        units = {"branch3x3_1": (192, 1, 0), "branch3x3_2": (320, 3, 0, 2), "branch7x7x3_1": (192, 1, 0)}
        units |= {"branch7x7x3_2": (192, (1, 7), (0, 3)), "branch7x7x3_3": (192, (7, 1), (3, 0))}
        super().__init__(wide, n, **units, branch7x7x3_4=(192, 3, 0, 2))

    def forward(self, x: Any) -> Any:
        three = self.through(x, "branch3x3_1", "branch3x3_2")
        seven = self.through(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return torch.cat([three, seven, max_pool2d(x, 3, stride=2)], 1)


class E(Branches):
    def __init__(self, wide: int, n: int):
        row, column = ((1, 3), (0, 1)), ((3, 1), (1, 0))
        units = {"branch1x1": (320, 1, 0), "branch3x3_1": (384, 1, 0)}
        units |= {"branch3x3_2a": (384, *row), "branch3x3_2b": (384, *column)}
        units |= {"branch3x3dbl_1": (448, 1, 0), "branch3x3dbl_2": (384, 3, 1)}
        units |= {"branch3x3dbl_3a": (384, *row), "branch3x3dbl_3b": (384, *column)}
        super().__init__(wide, n, **units, branch_pool=(192, 1, 0))

    def forward(self, x: Any) -> Any:
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch3x3_2a(three), self.branch3x3_2b(three), self.branch3x3dbl_3a(twice)]
        parts.append(self.branch3x3dbl_3b(twice))
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(pooled(x))], 1)


class Aux(nn.Module):
    def __init__(self, wide: int, n: int, classes: int):
        super().__init__()
        self.conv0, self.conv1 = Conv(wide, 128 // n, 1), Conv(128 // n, 768 // n, 5)
        self.fc = nn.Linear(768 // n, classes)

    def forward(self, x: Any) -> Any:
        return self.fc(self.conv1(self.conv0(avg_pool2d(x, 5, stride=3))).mean((2, 3)))


class Inception3(nn.Module):
    def __init__(self, classes: int, n: int = 1):
        super().__init__()
        stem = {"1a_3x3": (3, 32 // n, 3, 0, 2), "2a_3x3": (32 // n, 32 // n, 3, 0), "2b_3x3": (32 // n, 64 // n, 3, 1)}
        stem |= {"3b_1x1": (64 // n, 80 // n, 1, 0), "4a_3x3": (80 // n, 192 // n, 3, 0)}
        for name, (before, after, size, pad, *stride) in stem.items():
            options = {"padding": pad, "stride": stride[0] if stride else 1}
            self.add_module(f"Conv2d_{name}", Conv(before, after, size, **options))
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192 // n, n, 32), A(256 // n, n, 64), A(288 // n, n, 64)
        self.Mixed_6a, self.Mixed_6b = B(288 // n, n), C(768 // n, n, 128)
        self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = C(768 // n, n, 160), C(768 // n, n, 160), C(768 // n, n, 192)
        self.AuxLogits = Aux(768 // n, n, classes)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = D(768 // n, n), E(1280 // n, n), E(2048 // n, n)
        self.fc = nn.Linear(2048 // n, classes)

    def forward(self, x: Any) -> Any:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        aux = self.AuxLogits(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return self.fc(x.mean((2, 3))), aux
