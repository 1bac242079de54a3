"""
train_gpt2.cu --fp8 1, run on the CPU by tests/cuda_emulator: its 8-bit numbers, products, gradients
and steps against precision.py and train_gpt2.py --fp8 1, mutants against the checks.

    make test_train_gpt2cu                                  # the slow ones, too
"""
import subprocess

import numpy as np
import pytest
import torch

from test_train_gpt2cu import SOURCE, build, emulated, pytestmark

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


def run_program(folder, main, *words):
    """The standard output of `main`, compiled in the place of the trainer's main."""
    source = SOURCE.replace("int main(", "int trainer_main(") + main
    program = build(folder, "-O1", source=source)
    return subprocess.run([program, *map(str, words)], capture_output=True, check=True).stdout


# ---- the emulator's 8-bit numbers

def grid():
    """Each bf16, each number halfway between two neighbours of 8 bits, and both sides of it."""
    whole = torch.arange(2 ** 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    parts = [whole]
    for dtype in (E4M3, E5M2):
        codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
        codes = codes[codes.isfinite()].sort().values
        halfway = (codes[1:] + codes[:-1]) / 2
        parts += [halfway, halfway.nextafter(codes[1:]), halfway.nextafter(codes[:-1])]
    return torch.cat(parts)


@emulated
def test_the_emulators_conversions_to_and_from_8_bits_are_pytorchs(tmp_path):
    """A GPU's conversion saturates; PyTorch's does so only after a clamp."""
    x = grid()
    x.numpy().tofile(tmp_path / "numbers")
    printed = run_program(tmp_path, """
        int main(int, char** words) {
            float x;
            for (FILE* file = fopen(words[1], "rb"); fread(&x, 4, 1, file) == 1;) {
                for (auto kind : {__NV_E4M3, __NV_E5M2}) {
                    auto code = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, kind);
                    float value = cuemu::fp8_value(code, kind);
                    fwrite(&value, 4, 1, stdout);
                }
            }
        }""", tmp_path / "numbers")
    found = torch.from_numpy(np.frombuffer(printed, np.float32).reshape(-1, 2).copy())
    for column, dtype in enumerate((E4M3, E5M2)):
        most = torch.finfo(dtype).max
        expected = x.clamp(-most, most).to(dtype).float()
        assert len(x) > 66_000
        torch.testing.assert_close(found[:, column], expected, rtol=0, atol=0, equal_nan=True)
