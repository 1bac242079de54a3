"""
Images and sound are tokens too: the very same train_gpt2.py makes a model of them.

    python bench/modalities.py --out runs/modalities        # 10 CPU minutes at most

in:  the digits of scikit-learn, 1,797 images of 8 x 8 pixels of 17 grey levels, which come with its
     wheel: pip install --no-deps scikit-learn==1.9.1; sounds, which are made here
out: OUT/images and OUT/sound (shards, a tokenizer), OUT/images-run and OUT/sound-run (models),
     OUT/digits.png (drawn by the model), OUT/modalities.json, which talk.py reads

An image becomes a document: its class, then 32 patches of 1 x 2 pixels from the upper left to the
lower right. A patch has 17 x 17 values, so a token holds one without loss, and bits a pixel are
those of a lossless code, as PNG is. PNG gets all unseen images in one file, so that its header
costs nothing. The model's bits are measured given the class, which costs log2(10)/64 bits a pixel;
these are added.

A sound is a melody of plucked strings (Karplus and Strong 1983). Its spectrogram has a slice of 32
ms for each token: the loudness in 32 bands, replaced by the nearest of 256 typical slices (k-means,
of training sounds alone). Its model is compared with the entropy of how often each slice occurs.

The tokens stand in shards under ids that the tokenizer beside them calls something else; nothing in
the trainer looks at that, but for the samples it prints, which are nonsense here.
"""
import argparse
import csv
import gzip
import importlib.util
import json
import math
import shlex
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from bpe import SPECIAL_TOKENS, Tokenizer  # noqa: E402
from claims import mean, share_of  # noqa: E402
from model import load_checkpoint  # noqa: E402
from likelihood import mean_log_probs  # noqa: E402
from sample import Engine, load_tokenizer  # noqa: E402
from shards import write_bin  # noqa: E402

SIDE = 8                # pixels
LEVELS = 17             # of grey
CLASSES = 10
PATCHES = LEVELS ** 2   # values of two pixels
UNSEEN = 5              # every fifth document is held out

# ---- Documents of tokens → shards ----------------------------------------------------------------

def write_data(out, documents, n_tokens):
    """Documents of ids below n_tokens → OUT with a tokenizer and two shards, each document after
    the end-of-text token. → (tokenizer, held-out documents)."""
    text = " ".join(f"{i} {i * i}" for i in range(10 ** 4))
    tokenizer = Tokenizer.train([text], n_tokens + len(SPECIAL_TOKENS), name=out.name)
    assert tokenizer.eot == n_tokens, (tokenizer.eot, n_tokens)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer")
    split = dict(val=documents[::UNSEEN],
                 train=[ids for i, ids in enumerate(documents) if i % UNSEEN])
    for name, some in split.items():
        ids = [i for document in some for i in (tokenizer.eot, *document)]
        write_bin(out / f"{out.name}_{name}_000000.bin", np.array(ids, dtype="<u2"))
    return tokenizer, split["val"]

TRAIN = ("train_gpt2.py --model d4 --config n_embd=64 n_head=2 block_size=128 windows=L "
         "--data {data} --out {run} --total_batch_size 2048 --max_steps {steps} --eval_every 100 "
         "--seed 1337 --resume")

def train(data, run, steps):
    """Runs train_gpt2.py and shows its command."""
    words = shlex.split(TRAIN.format(data=data, run=run, steps=steps))
    print(f"\n$ python {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)

def bits_of(model, eot, documents, n_given):
    """For each document the bits that the model needs for all tokens but the first n_given."""
    spans = [([eot, *ids], 1 + n_given) for ids in documents]
    return [-log_prob * (len(ids) - n_given) / math.log(2)
            for log_prob, ids in zip(mean_log_probs(model, spans), documents)]

# ---- Images --------------------------------------------------------------------------------------

def read_digits():
    """scikit-learn's digits → (images (N, 64) of 0 to 16, classes (N,)). They are read from the
    file in its wheel; nothing is imported, so that scipy is not needed."""
    found = importlib.util.find_spec("sklearn")
    if not found:
        raise SystemExit("scikit-learn is missing; pip install --no-deps scikit-learn==1.9.1")
    path = Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with gzip.open(path, "rt") as file:
        rows = np.array([[float(cell) for cell in row] for row in csv.reader(file)], dtype=np.int64)
    return rows[:, :-1], rows[:, -1]

def image_tokens(image, label):
    """64 pixels of 0 to 16 and a class → 33 ids: the class, then a patch of two pixels each."""
    pairs = image.reshape(-1, 2)
    return [PATCHES + int(label), *(LEVELS * pairs[:, 0] + pairs[:, 1]).tolist()]

def pixels_of(ids):
    """The ids of 32 patches → 8 x 8 pixels of 0 to 16."""
    return np.array([divmod(i, LEVELS) for i in ids]).reshape(SIDE, SIDE)

def png(pixels):
    """Pixels of 0 to 255, (H, W) → the smallest PNG file that one filter for all rows gives."""
    H, W = pixels.shape
    pixels = pixels.astype(np.int64)
    left = np.pad(pixels, ((0, 0), (1, 0)))[:, :-1]
    above = np.pad(pixels, ((1, 0), (0, 0)))[:-1]
    corner = np.pad(pixels, ((1, 0), (1, 0)))[:-1, :-1]
    guess = left + above - corner               # Paeth: the neighbour that is nearest to it
    near = np.stack([abs(guess - left), abs(guess - above), abs(guess - corner)]).argmin(0)
    paeth = np.choose(near, [left, above, corner])
    found = []
    for number, predicted in enumerate((0 * pixels, left, above, (left + above) // 2, paeth)):
        rows = np.pad((pixels - predicted) % 256, ((0, 0), (1, 0)), constant_values=number)
        found.append(zlib.compress(rows.astype(np.uint8).tobytes(), 9))
    head = struct.pack(">IIBBBBB", W, H, 8, 0, 0, 0, 0)     # 8 bits of grey
    chunks = ((b"IHDR", head), (b"IDAT", min(found, key=len)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks)

def images(out, steps):
    """Trains on digits → {"images", "png"}: bits a pixel of unseen ones; "class": how often the
    most probable class is the right one."""
    pixels, labels = read_digits()
    documents = [image_tokens(image, label) for image, label in zip(pixels, labels)]
    tokenizer, unseen = write_data(out / "images", documents, PATCHES + CLASSES)
    train(out / "images", out / "images-run", steps)
    model, _ = load_checkpoint(out / "images-run")
    n = SIDE * SIDE
    bits = bits_of(model, tokenizer.eot, unseen, n_given=1)
    sheet = np.concatenate([pixels_of(ids[1:]) for ids in unseen])      # (8 N, 8)
    guessed = [[PATCHES + label, *ids[1:]] for ids in unseen for label in range(CLASSES)]
    by_class = np.array(bits_of(model, tokenizer.eot, guessed, 1)).reshape(-1, CLASSES)
    right = [PATCHES + guess == ids[0] for guess, ids in zip(by_class.argmin(1), unseen)]
    draw(model, out)
    return dict(images=mean([(b + math.log2(CLASSES)) / n for b in bits]),
                png=mean([8 * len(png(sheet)) / sheet.size] * 2), classified=share_of(right))

def draw(model, out, samples=8):
    """Digits that the model writes, a row for each class → OUT/digits.png, 8 times as large."""
    engine = Engine(model.for_inference(), load_tokenizer(out / "images-run"))
    prompts = [[engine.tokenizer.eot, PATCHES + label] for label in range(CLASSES)]
    drawn = []
    for completion in engine.generate(prompts, SIDE * SIDE // 2, num_samples=samples, seed=0):
        ids = [i if i < PATCHES else 0 for i in completion.ids]
        drawn.append(pixels_of(ids + [0] * (SIDE * SIDE // 2 - len(ids))))
    drawn = [np.pad(digit, 1, constant_values=LEVELS // 2) for digit in drawn]      # a frame
    rows = [np.concatenate(drawn[i:i + samples], 1) for i in range(0, len(drawn), samples)]
    sheet = np.concatenate(rows).repeat(8, 0).repeat(8, 1) * 255 // (LEVELS - 1)
    (out / "digits.png").write_bytes(png(sheet))

# ---- Sound ---------------------------------------------------------------------------------------

RATE = 8000             # samples a second
SLICE = 256             # samples, 32 ms
BANDS = 32
CODES = 256             # typical slices
NOTES = 12              # of a melody
SCALE = (0, 2, 4, 7, 9, 12, 14, 16)     # semitones

def pluck(frequency, n, rng):
    """n samples of a plucked string: noise in a loop as long as a period, of which each round takes
    the mean of neighbours."""
    period = round(RATE / frequency)
    sound = np.zeros(n + period + 1)
    sound[:period + 1] = rng.uniform(-1, 1, period + 1)
    for start in range(period + 1, len(sound), period):     # a period at a time: all are known
        end = min(start + period, len(sound))
        before = sound[start - period - 1:end - period]
        sound[start:end] = 0.498 * (before[1:] + before[:-1])
    return sound[:n]

def melody(number):
    """A random walk on a scale, each note of 4 or 8 slices → samples."""
    rng = np.random.default_rng(number)
    place = int(rng.integers(len(SCALE)))
    notes = []
    for _ in range(NOTES):
        place = int(np.clip(place + rng.integers(-2, 3), 0, len(SCALE) - 1))
        frequency = 220 * 2 ** (SCALE[place] / 12)
        notes.append(pluck(frequency, int(rng.choice((4, 8))) * SLICE, rng))
    return np.concatenate(notes)

def spectrogram(sound):
    """Samples → the log of the loudness in each band, (slices, BANDS)."""
    frames = torch.tensor(sound[:len(sound) // SLICE * SLICE].reshape(-1, SLICE))
    power = torch.fft.rfft(frames * torch.hann_window(SLICE)).abs()[:, 1:].square()     # (n, 128)
    return power.view(len(frames), BANDS, -1).sum(-1).add(1e-3).log().float()

def k_means(rows, k, rounds=12, seed=0):
    """Rows (N, D) → k centres (k, D)."""
    torch.manual_seed(seed)
    centres = rows[torch.randperm(len(rows))[:k]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        counts = torch.bincount(nearest, minlength=k)[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres

def sound(out, steps, melodies=600):
    """Trains on melodies → {"sound", "frequencies"}: bits a slice of unseen ones."""
    spectra = [spectrogram(melody(number)) for number in range(melodies)]
    seen = [rows for i, rows in enumerate(spectra) if i % UNSEEN]
    centres = k_means(torch.cat(seen), CODES)
    documents = [torch.cdist(rows, centres).argmin(1).tolist() for rows in spectra]
    tokenizer, unseen = write_data(out / "sound", documents, CODES)
    train(out / "sound", out / "sound-run", steps)
    model, _ = load_checkpoint(out / "sound-run")
    bits = bits_of(model, tokenizer.eot, unseen, n_given=0)
    counts = Counter(i for number, ids in enumerate(documents) if number % UNSEEN for i in ids)
    total = counts.total() + CODES              # one more of each, so that none has probability 0
    rare = [[-math.log2((counts[i] + 1) / total) for i in ids] for ids in unseen]
    return dict(sound=mean([b / len(ids) for b, ids in zip(bits, unseen)]),
                frequencies=mean([sum(need) / len(need) for need in rare]))

def main():
    parser = argparse.ArgumentParser(description="images and sound through train_gpt2.py")
    parser.add_argument("--out", default="runs/modalities", help="folder of data and models")
    parser.add_argument("--steps", type=int, default=120,
                        help="of training, for each; with 400 it learns the few documents by heart")
    args = parser.parse_args()
    out = Path(args.out).absolute()
    started = time.perf_counter()
    found = {**images(out, args.steps), **sound(out, args.steps)}
    bits = {name: [measured.value, measured.error] for name, measured in found.items()}
    seconds = time.perf_counter() - started
    (out / "modalities.json").write_text(json.dumps(dict(bits=bits, seconds=seconds), indent=1))
    print("\n| | bits |\n|---|---|")
    for name, measured in found.items():
        print(f"| {name} | {measured} |")
    print(f"{seconds:.0f} s; {out / 'modalities.json'}, {out / 'digits.png'}")

if __name__ == "__main__":
    main()
