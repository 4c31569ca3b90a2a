"""The haystack generator, second reader of src/eval/haystack.json (the first is src/eval/haystack.cpp).

Both write the same bytes for the same seed. The rules:

1. Random numbers: SplitMix64 from the seed; Draw(n) = (high 32 bits of the next number) * n >> 32.
2. Needle i of n has a key, "{tone} {thing}", each word drawn from its list. A needle with odd i is a near miss of the
   one before it: if i % 4 == 1 it takes over the first word, else the second. A key that exists is drawn again.
   Then its value: value_digits digits, each Draw(10).
3. Filler is a row of pieces. Own filler: a template drawn from "sentences", its {fields} filled from left to right,
   each by one draw ({number} is 1 + Draw(9999)), and a space, or after every 8th sentence a newline.
   A user's text: cut after every newline and every ". ", and into runs of at most 400 bytes (at UTF-8 boundaries);
   the first piece is drawn, the others follow in order and start over at the end.
4. A needle takes its sentence and one space. Filler takes the rest of the bytes; the piece that does not fit is cut
   (at a UTF-8 boundary). Needle i stands before the first piece that begins at or after filler byte
   (2i + 1) * filler_bytes / 2n.
5. The text is followed by a question, which ends where the value must come: "{value}." and the end of text.
"""

import json
import pathlib
import re

GRAMMAR = pathlib.Path(__file__).parents[2] / "src" / "eval" / "haystack.json"
MASK = (1 << 64) - 1
MAX_PIECE = 400


class Random:
    """SplitMix64."""

    def __init__(self, seed):
        self.state = seed & MASK

    def draw(self, n):
        self.state = (self.state + 0x9E3779B97F4A7C15) & MASK
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return ((z ^ (z >> 31)) >> 32) * n >> 32


class Haystack:
    def __init__(self, generator, text, needles):
        self.text = text  # bytes
        self.needles = needles  # (key, value) in the order of the text
        self.generator = generator

    def question(self, i):
        return self.generator.grammar["question"].replace("{key}", self.needles[i][0]).encode()

    def answer(self, i):
        return self.generator.grammar["answer"].replace("{value}", self.needles[i][1]).encode()


class HaystackGenerator:
    def __init__(self, filler_text=None, grammar=GRAMMAR):
        self.grammar = json.loads(pathlib.Path(grammar).read_text())
        self.words = self.grammar["words"]
        self.templates = [self._parse(s) for s in self.grammar["sentences"]]
        self.pieces = split_pieces(filler_text) if filler_text else None

    def _parse(self, sentence):
        parts = re.split(r"\{(\w+)\}", sentence)  # literal, field, literal, ...
        return [p if i % 2 == 0 else (None if p == "number" else self.words[p])
                for i, p in enumerate(parts)]

    def text_bytes(self, tokens):
        """Bytes of text so that <bos>, text, the longest question and its answer are `tokens` tokens."""
        longest = " ".join(max(self.words[w], key=len) for w in ("tone", "thing"))
        question = self.grammar["question"].replace("{key}", longest)
        return tokens - 2 - len(question) - self.grammar["value_digits"] - len(".")

    def filler(self, random):
        """Endless pieces."""
        if self.pieces:
            i = random.draw(len(self.pieces))
            while True:
                yield self.pieces[i]
                i = (i + 1) % len(self.pieces)
        draw, templates, line = random.draw, self.templates, self.grammar["sentences_per_line"]
        count = 0
        while True:
            out = []
            for i, part in enumerate(templates[draw(len(templates))]):
                if i % 2 == 0:
                    out.append(part)
                elif part is None:
                    out.append(str(1 + draw(9999)))
                else:
                    out.append(part[draw(len(part))])
            count += 1
            out.append("\n" if count % line == 0 else " ")
            yield "".join(out).encode()

    def draw_needles(self, random, n):
        tones, things = self.words["tone"], self.words["thing"]
        keys, needles = [], []
        while len(keys) < n:
            i = len(keys)
            tone = keys[-1][0] if i % 4 == 1 else tones[random.draw(len(tones))]
            thing = keys[-1][1] if i % 4 == 3 else things[random.draw(len(things))]
            if (tone, thing) in keys:
                continue
            keys.append((tone, thing))
            value = "".join(str(random.draw(10)) for _ in range(self.grammar["value_digits"]))
            needles.append((f"{tone} {thing}", value))
        return needles

    def make(self, size, n, seed, positions=None, filler=None):
        """A haystack of `size` bytes. Training passes its own needle `positions` (of filler_bytes, in [0, 1)) and
        `filler` (a function of a Random that yields pieces)."""
        random = Random(seed)
        needles = self.draw_needles(random, n)
        sentences = [self.grammar["needle"].replace("{key}", k).replace("{value}", v).encode() + b" "
                     for k, v in needles]
        filler_bytes = size - sum(map(len, sentences))
        if filler_bytes < 0:
            raise ValueError(f"{n} needles do not fit into {size} bytes")
        at = ([int(p * filler_bytes) for p in sorted(positions)] if positions else
              [(2 * i + 1) * filler_bytes // (2 * n) for i in range(n)])
        out, used, placed = [], 0, 0
        for piece in (filler or self.filler)(random):
            while placed < n and used >= at[placed]:
                out.append(sentences[placed])
                placed += 1
            piece = cut(piece, filler_bytes - used)
            if not piece:
                break
            out.append(piece)
            used += len(piece)
        out.extend(sentences[placed:])
        return Haystack(self, b"".join(out), needles)


def cut(piece, size):
    """The longest prefix of at most `size` bytes that ends at a UTF-8 boundary."""
    if len(piece) <= size:
        return piece
    while size > 0 and piece[size] & 0xC0 == 0x80:
        size -= 1
    return piece[:size]


def split_pieces(text):
    pieces = []
    for run in re.findall(rb".*?(?:\n|\. )|.+$", text, re.S):
        while run:
            piece = cut(run, MAX_PIECE)
            pieces.append(piece)
            run = run[len(piece):]
    return pieces
