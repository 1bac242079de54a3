"""
bench/modalities.py: patches and slices become tokens and back without loss, PNG is PNG, and the
trainer reads the shards.
"""
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from conftest import ROOT
from train_gpt2 import Shards, data_tokenizer

sys.path.append(str(ROOT / "bench"))
import modalities  # noqa: E402


def test_pixels_become_tokens_and_back():
    image = np.random.default_rng(0).integers(0, 17, 64)
    ids = modalities.image_tokens(image, 7)
    assert ids[0] == 289 + 7 and len(ids) == 33 and max(ids[1:]) < 289
    assert (modalities.pixels_of(ids[1:]) == image.reshape(8, 8)).all()


def unfiltered(data):
    """Reads a PNG of 8-bit grey as its specification says → (H, W), and the numbers of filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        length, name = struct.unpack(">I4s", data[at:at + 8])
        chunks[name] = data[at + 8:at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length:at + 12 + length])[0] == zlib.crc32(
            name + chunks[name])
        at += 12 + length
    W, H, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, colour) == (8, 0) and b"IEND" in chunks
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(H, W + 1).astype(int)
    out = np.zeros((H + 1, W + 1), int)
    for y in range(H):
        for x in range(W):
            a, b, c = out[y + 1, x], out[y, x + 1], out[y, x]
            p = a + b - c
            paeth = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            out[y + 1, x + 1] = (rows[y, x + 1] + (0, a, b, (a + b) // 2, paeth)[rows[y, 0]]) % 256
    return out[1:, 1:], set(rows[:, 0])


@pytest.mark.parametrize("pixels, filters", [
    (np.add.outer(np.arange(9) ** 2, 7 * np.arange(12)) % 256, {1, 2, 3, 4}),
    (np.random.default_rng(1).integers(0, 256, (5, 4)), {0, 1, 2, 3, 4}),
    (np.tile([3, 200], (20, 20)), {0, 2})])
def test_a_png_is_read_back_by_the_rules_of_its_specification(pixels, filters):
    found, used = unfiltered(modalities.png(pixels))
    assert (found == pixels).all() and used <= filters and len(used) == 1


def test_the_trainer_reads_the_shards_and_ids_keep_their_meaning(tmp_path):
    documents = [[i, 298, 7] for i in range(10)]
    tokenizer, unseen = modalities.write_data(tmp_path / "images", documents, 299)
    assert unseen == [[0, 298, 7], [5, 298, 7]] and tokenizer.eot == 299
    assert Shards(tmp_path / "images", "val").read(0, 8).tolist() == [299, 0, 298, 7, 299, 5, 298, 7]
    assert Shards(tmp_path / "images", "train").n_tokens == 8 * 4
    assert data_tokenizer(tmp_path / "images").sha256 == tokenizer.sha256


def test_a_plucked_string_has_its_pitch_and_fades():
    sound = modalities.pluck(400, 8000, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(sound[:4000])) ** 2      # 2 Hz a bin
    assert abs(2 * power[1:1000].argmax() + 2 - 400) < 12
    assert np.square(sound[-800:]).sum() < 0.2 * np.square(sound[:800]).sum()


def test_k_means_finds_the_centres_that_are_there():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    torch.manual_seed(1)
    rows = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = min((modalities.k_means(rows, 3, seed=seed) for seed in range(4)),
                key=lambda some: torch.cdist(rows, some).amin(1).sum())
    assert torch.cdist(centres, found).amin(1).max() < 0.2
