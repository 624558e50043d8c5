"""Does any damage crash the reader, or pass as another tree?"""

import random

import pytest

from quantjax.storage import StorageError, load, read_header
from tests.daily import daily

from .trees import TREE, assert_same


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three small damages; more in the header, where one byte can mean anything."""
    out = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        end = rng.choice([9, header, len(out)])
        i, n = rng.randrange(min(end, len(out)) or 1), rng.randrange(1, 9)
        match rng.randrange(10):
            case 0 | 1 if out:
                out[i] ^= 1 << rng.randrange(8)
            case 2 if out:
                out[i] = rng.choice(b'0123456789 "{}[],:-nul\\\t\x00\xff')
            case 3:
                out[i:i] = rng.randbytes(n)
            case 4:
                del out[i : i + n]
            case 5:
                del out[rng.randrange(len(out) + 1) :]
            case 6:
                j = rng.randrange(len(out) or 1)
                out[i : i + n], out[j : j + n] = out[j : j + n], out[i : i + n]
            case 7:
                out += out[i : i + n]
            case _:  # a digit for a digit: the header stays JSON and says something else
                digits = [k for k, byte in enumerate(out[:header]) if chr(byte).isdigit()]
                if digits:
                    out[rng.choice(digits)] = rng.choice(b"0123456789")
    return bytes(out)


@pytest.mark.parametrize("tries", daily([500, 2500], [500]))
def test_no_mutation_crashes_or_passes_as_another_tree(whole, tries):
    data, rng = whole.read_bytes(), random.Random(0)
    refused: dict[str, int] = {}
    changed = 0
    for _ in range(tries):
        mutated = mutate(data, rng)
        changed += mutated != data
        whole.write_bytes(mutated)
        try:
            result = load(whole)
        except StorageError as error:
            assert str(whole) in str(error)
            refused[type(error).__name__] = refused.get(type(error).__name__, 0) + 1
            continue
        assert_same(result, TREE)
        assert read_header(whole).metadata == {"step": "7"}
    assert changed > 0.96 * tries and sum(refused.values()) > 0.96 * tries
    assert {"CorruptFile", "NotQuantjaxFile"} <= set(refused)


@pytest.mark.parametrize("step", daily([3, 13], [13]))
def test_every_single_byte_counts(whole, step):
    # One byte after the other; only white space of the header may change without a word.
    data = whole.read_bytes()
    for i in range(0, len(data), step):
        whole.write_bytes(data[:i] + bytes([data[i] ^ 0x04]) + data[i + 1 :])
        try:
            assert_same(load(whole), TREE)
            assert chr(data[i]).isspace()
        except StorageError:
            continue
