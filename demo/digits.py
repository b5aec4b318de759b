"""The data: scikit-learn's handwritten digits, their prompts, and the judge.

A digit is an 8×8 grey picture in [0, 1]. The judge is a support vector machine trained on real
digits; what it thinks of generated ones is how the demo measures itself.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HELD_BACK = (3, 7)
"""Digits that the base model is never shown."""
KNOWN = tuple(digit for digit in range(10) if digit not in HELD_BACK)
TARGET = 7
"""The held-back digit that the demo's LoHa teaches."""


def prompt(digit: int) -> str:
    """The prompt that asks for `digit`, e.g. "a handwritten seven"."""
    return f"a handwritten {WORDS[digit]}"


@dataclass(frozen=True)
class Digits:
    """Pictures (n, 8, 8) float32 in [0, 1] and labels (n,) int64."""

    pictures: np.ndarray
    labels: np.ndarray

    def only(self, digits: tuple[int, ...]) -> "Digits":
        """The part of the data that shows one of `digits`."""
        keep = np.isin(self.labels, digits)
        return Digits(self.pictures[keep], self.labels[keep])


@cache
def load() -> tuple[Digits, Digits]:
    """The 1,797 digits, split 80:20 into what may be trained on and what is held out."""
    pictures, labels = load_digits(return_X_y=True)
    pictures = (pictures / 16).astype(np.float32).reshape(-1, 8, 8)
    parts = train_test_split(pictures, labels, test_size=0.2, random_state=0, stratify=labels)
    return Digits(parts[0], parts[2]), Digits(parts[1], parts[3])


class Judge:
    """A classifier of real digits.

    Attributes:
        accuracy: share of held-out real digits that it reads correctly.
    """

    def __init__(self) -> None:
        train, test = load()
        self._svm = SVC(C=10, gamma="scale").fit(train.pictures.reshape(-1, 64), train.labels)
        self.accuracy = float(np.mean(self.read(test.pictures) == test.labels))

    def read(self, pictures: np.ndarray) -> np.ndarray:
        """Which digit each picture shows.

        Args:
            pictures: (n, h, w) in [0, 1], h and w multiples of 8; averaged down to 8×8.

        Returns:
            (n,) int64 digits.
        """
        n, height, width = pictures.shape
        small = pictures.reshape(n, 8, height // 8, 8, width // 8).mean(axis=(2, 4))
        return self._svm.predict(small.reshape(n, 64))
