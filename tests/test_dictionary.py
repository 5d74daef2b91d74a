"""The dictionary: the same signs for ever, in every storage and every part of it."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dictionary import STORAGES, Dictionary, code_words, pack_codes, rademacher_codes, unpack_codes

DIM, K = 5, 1001


def finaliser(x):
    """MurmurHash3's, in numpy's own arithmetic modulo 2^32."""
    x = np.uint32(x)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def word_by_hand(seed, row, word):
    with np.errstate(over="ignore"):
        key = finaliser(finaliser(np.uint32((seed + 0x9E3779B9) % 2**32)) ^ np.uint32(row))
        return int(finaliser(finaliser(key ^ np.uint32(word)) + key))


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 5, 2**63 - 1])
def test_words_are_the_hash_of_seed_row_and_index(seed):
    words = code_words(DIM, 100, seed, first=64)
    assert words.dtype == torch.int32
    expected = [[word_by_hand(seed, row, word) for word in range(2, 6)] for row in range(DIM)]
    assert (words.long() % 2**32).tolist() == expected


def test_codes_are_what_they_always_were():
    """Known answers: a checkpoint that holds only the seed must find the same dictionary in every version."""
    codes = rademacher_codes(3, 70, seed=5)
    assert pack_codes(codes).tolist() == KNOWN_BITS
    assert torch.equal(rademacher_codes(3, 200, seed=5)[:, :70], codes)  # a part does not depend on the whole
    assert torch.equal(rademacher_codes(9, 70, seed=5)[:3], codes)
    assert not torch.equal(rademacher_codes(3, 70, seed=6), codes)
    assert (rademacher_codes(3, 32) > 0).any(dim=1).all()  # the hash maps 0 to 0


KNOWN_BITS = [
    [83, 145, 92, 14, 112, 57, 76, 232, 41],
    [101, 203, 172, 115, 21, 191, 64, 180, 63],
    [111, 224, 147, 188, 59, 104, 146, 222, 63],
]


def test_codes_are_fair_and_uncorrelated():
    codes = rademacher_codes(256, 4096).double()
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert abs(codes.mean()) < 4 / math.sqrt(codes.numel())
    for gram, length in ((codes.T @ codes, 256), (codes @ codes.T, 4096)):
        off = gram[~torch.eye(len(gram), dtype=bool)] / math.sqrt(length)
        assert abs(off.mean()) < 0.02 and off.std() == pytest.approx(1, abs=0.02)  # Eq. 5: variance 1 / F


@pytest.mark.parametrize("num_codes", [1, 7, 8, 9, 64, 131])
def test_packing_and_back(num_codes):
    codes = rademacher_codes(5, num_codes)
    packed = pack_codes(codes)
    assert packed.shape == (5, math.ceil(num_codes / 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, num_codes), codes)
    k = num_codes - 1
    assert bool((packed[2, k // 8] >> (k % 8)) & 1) == (codes[2, k] > 0)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_holds_the_same_codes(storage):
    codes = rademacher_codes(DIM, K, seed=3)
    dictionary = Dictionary(DIM, K, 3, storage)
    assert dictionary.shape == codes.shape and torch.equal(dictionary.dense(), codes)
    for start, stop in ((0, 1), (32, 64), (64, K), (960, 1000), (7, 40), (33, 34)):
        assert torch.equal(dictionary.tile(start, stop), codes[:, start:stop])
    index = torch.tensor([0, 31, 32, 1000, 500, 500])
    assert torch.equal(dictionary.columns(index), codes[:, index])
    assert dictionary.num_bytes() == {"int8": DIM * K, "bits": DIM * 4 * 32, "seed": 0}[storage]


@pytest.mark.parametrize("storage", STORAGES)
def test_shards_are_the_parts_of_the_whole(storage):
    codes = rademacher_codes(DIM, 384, seed=3)
    shards = [Dictionary(DIM, 384, 3, storage, (i, 3)) for i in range(3)]
    assert torch.equal(torch.cat([shard.dense() for shard in shards], dim=1), codes)
    assert [shard.first for shard in shards] == [0, 128, 256]
    assert torch.equal(shards[1].columns(torch.tensor([0, 100])), codes[:, [128, 228]])
    assert all(shard.packed() is None for shard in shards)
    shards[2].fill(pack_codes(-codes))  # from a file that holds all of them
    assert torch.equal(shards[2].dense(), codes[:, 256:] if storage == "seed" else -codes[:, 256:])


@pytest.mark.parametrize("storage", ["int8", "bits"])
def test_a_file_s_bits_replace_the_codes(storage):
    other = rademacher_codes(DIM, K, seed=4)
    dictionary = Dictionary(DIM, K, 3, storage)
    dictionary.fill(pack_codes(other))
    assert torch.equal(dictionary.dense(), other)
    assert torch.equal(dictionary.packed(), pack_codes(other))


@pytest.mark.parametrize("storage", ["int8", "bits"])
def test_bits_are_the_same_however_they_are_kept(storage):
    packed = Dictionary(DIM, K, 3, storage).packed()
    assert torch.equal(packed, pack_codes(rademacher_codes(DIM, K, seed=3)))
    assert packed[:, -1].max() < 2 ** (K % 8)  # nothing after the last code


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("storage", STORAGES)
def test_only_the_first_checkpoint_packs_the_codes(storage):
    dictionary = Dictionary(DIM, K, 3, storage)
    first = dictionary.packed()
    with CountOperations() as operations:
        assert dictionary.packed() is first
    assert operations.count == 0
    dictionary.fill(pack_codes(rademacher_codes(DIM, K, seed=4)))  # the codes of a file
    expected = None if storage == "seed" else pack_codes(rademacher_codes(DIM, K, seed=4))
    assert dictionary.packed() is expected or torch.equal(dictionary.packed(), expected)
    dictionary.seed = 5
    dictionary.fill()
    expected = None if storage == "seed" else pack_codes(rademacher_codes(DIM, K, seed=5))
    assert dictionary.packed() is expected or torch.equal(dictionary.packed(), expected)


@pytest.mark.parametrize(("settings", "said"), [({"storage": "int4"}, "int4"), ({"shard": (0, 3)}, "multiple of 96")])
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Dictionary(DIM, K, **settings)


def test_given_codes_are_a_dictionary():
    codes = rademacher_codes(DIM, K)
    dictionary = Dictionary.of(codes)
    assert dictionary.dense() is not None and torch.equal(dictionary.dense(), codes)
    assert Dictionary.of(dictionary) is dictionary
