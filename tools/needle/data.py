"""Training sequences: <bos>, a haystack, then questions and answers in random order."""

import string

import numpy as np

from haystack import GRAMMAR, Haystack, HaystackGenerator, Random, split_pieces
from model import BOS, EOS

GENERATOR = HaystackGenerator()
WORDS = [w for words in GENERATOR.grammar["words"].values() for w in words]
LETTERS = "etaoinshrdlucmfwypvbgkjqxz" + "äéøßčμ"


def scrambled(random):
    """The grammar's words in no order."""
    while True:
        yield (WORDS[random.draw(len(WORDS))] + (".\n" if random.draw(12) == 0 else " ")).encode()


def invented(random):
    """Words nobody knows."""
    while True:
        word = "".join(LETTERS[random.draw(1 + random.draw(len(LETTERS)))] for _ in range(1 + random.draw(9)))
        word = word.capitalize() if random.draw(8) == 0 else word
        yield (word + (". ", ", ", "\n", ": ", "; ", " (")[random.draw(6)] if random.draw(9) == 0
               else word + " ").encode()


def numbers(random):
    """Log lines and tables: many digits that answer nothing."""
    draw = random.draw
    while True:
        if draw(2):
            yield (f"{2000 + draw(60)}-{10 + draw(3)}-{10 + draw(20)} {10 + draw(14)}:{10 + draw(50)} "
                   f"{WORDS[draw(len(WORDS))]}={draw(1000000)} id {draw(1 << 31)}\n").encode()
        else:
            yield (", ".join(str(draw(10 ** (1 + draw(7)))) for _ in range(1 + draw(8))) + "\n").encode()


def code(random):
    """Lines that look like a program."""
    draw = random.draw

    def name():
        return WORDS[draw(len(WORDS))].replace(" ", "_") + ("" if draw(3) else f"_{draw(100)}")

    while True:
        line = (f"if ({name()} < {draw(1000)}) return {name()};", f"{name()} = {name()}[{draw(64)}] + {name()};",
                f"// {name()} {name()} {name()}", f"def {name()}({name()}, {name()}=None):", "}", "",
                f'{name()}("{name()} {name()}", {draw(100000)});', f"#include <{name()}/{name()}.h>")[draw(8)]
        yield (" " * (2 * draw(5)) + line + "\n").encode()


def dialect(random):
    """A made-up language: an alphabet, 30 to 400 words of which few are common, its own punctuation and numbers."""
    draw = random.draw
    letters = [LETTERS[draw(len(LETTERS))] for _ in range(8 + draw(40))]
    after = {a: [letters[draw(len(letters))] for _ in range(1 + draw(6))] for a in letters}
    words = []
    for _ in range(30 + draw(370)):
        word = letters[draw(len(letters))]
        for _ in range(draw(10)):
            word += after[word[-1]][draw(len(after[word[-1]]))]
        words.append(word)
    marks = [(". ", ", ", "\n", ": ", "; ", " (", ") ", "\n\n", "\n    ", " = ", "_", "/", "-", ".", "`", " | ",
              "**", "\n- ", "# ", "'s ", '"', "->", "[", "] ", "\n\t", "{\n", "}\n", ";\n", " + ", "%", " @")[draw(31)]
             for _ in range(2 + draw(10))]
    mark_rate, number_rate, capital_rate = 2 + draw(12), 4 + draw(60), 3 + draw(30)
    while True:
        word = words[draw(1 + draw(1 + draw(len(words))))]
        if draw(number_rate) == 0:
            word = str(draw(10 ** (1 + draw(9)))) if draw(4) else f"{draw(1 << 32):x}"
        word = word.capitalize() if draw(capital_rate) == 0 else word
        yield (word + (marks[draw(len(marks))] if draw(mark_rate) == 0 else " ")).encode()


def repository_pieces():
    """This repository's own sources and documents."""
    files = sorted(f for folder in ("src", "include", "docs", "tools", "tests", "bench", "scripts")
                   for f in (GRAMMAR.parents[2] / folder).rglob("*")
                   if f.suffix in (".h", ".cpp", ".cu", ".cuh", ".md", ".py"))
    return split_pieces(b"\n".join(f.read_bytes() for f in files))


REPOSITORY = repository_pieces()


def repository(random):
    i = random.draw(len(REPOSITORY))
    while True:
        yield REPOSITORY[i]
        i = i + 1 if random.draw(40) and i + 1 < len(REPOSITORY) else random.draw(len(REPOSITORY))


def enciphered(random):
    """Grammar or repository with the letters permuted, and in half of the cases the digits."""
    alphabet, shuffled = list(string.ascii_lowercase), list(string.ascii_lowercase)
    digits = list(string.digits)
    for items in (shuffled, digits):
        for i in range(len(items) - 1, 0, -1):
            j = random.draw(i + 1)
            items[i], items[j] = items[j], items[i]
    if random.draw(2):
        digits = list(string.digits)
    old = "".join(alphabet) + "".join(alphabet).upper() + string.digits
    new = "".join(shuffled) + "".join(shuffled).upper() + "".join(digits)
    table = bytes.maketrans(old.encode(), new.encode())
    for piece in (GENERATOR.filler if random.draw(3) == 0 else repository)(random):
        yield piece.translate(table)


def mixed(random):
    """Passages of the other styles."""
    others = (GENERATOR.filler, scrambled, invented, numbers, code, dialect, dialect, repository, enciphered)
    while True:
        left = 100 + random.draw(4000)
        for piece in others[random.draw(len(others))](random):
            yield piece
            left -= len(piece)
            if left < 0:
                break


# Half of the main training reads the grammar's own sentences (None); the last stage reads what users might pass.
STYLES = (None, None, None, None, scrambled, invented, numbers, code)
FOREIGN_STYLES = (None, None, numbers, code, dialect, dialect, dialect, repository, repository, enciphered, enciphered,
                  mixed)


def sequence(length, seed, styles):
    """Token ids [length] and the mask [length] of the tokens that are answers."""
    random = Random(seed)
    most = max(4, min(32, length // 170))
    needles = most - random.draw(most // 2 + 1)
    asked = min(needles, 3 if length <= 512 else 8 if length <= 2048 else 16)
    style = styles[random.draw(len(styles))]
    positions = [random.draw(1 << 20) / (1 << 20) for _ in range(needles)]
    order = list(range(needles))
    for i in range(asked):  # the head of a random permutation
        j = i + random.draw(needles - i)
        order[i], order[j] = order[j], order[i]
    haystack_seed = random.draw(1 << 32)
    tail = []  # (bytes, whether they are an answer)
    drawn = Haystack(GENERATOR, b"", GENERATOR.draw_needles(Random(haystack_seed), needles))
    for i in order[:asked]:
        tail += [([*drawn.question(i)], False), ([*drawn.answer(i), EOS], True)]
    tail_length = sum(len(t) for t, _ in tail)
    text = GENERATOR.make(length - 1 - tail_length, needles, haystack_seed, positions, style).text
    text = text.ljust(length - 1 - tail_length)  # a cut inside a character leaves up to 3 bytes
    tokens = np.concatenate([[BOS], np.frombuffer(text, np.uint8)] + [t for t, _ in tail]).astype(np.int16)
    mask = np.zeros(length, bool)
    mask[length - tail_length:] = np.concatenate([np.full(len(t), answer) for t, answer in tail])
    return tokens, mask


def batch(length, rows, seed, foreign=False):
    styles = FOREIGN_STYLES if foreign else STYLES
    pairs = [sequence(length, (seed << 12) + row, styles) for row in range(rows)]
    return np.stack([t for t, _ in pairs]), np.stack([m for _, m in pairs])
